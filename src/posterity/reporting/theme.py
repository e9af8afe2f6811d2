"""The look of every figure: one plotly template, in the light colours of `posterity.palette`."""

import plotly.graph_objects as go

from posterity.palette import AXIS, GRID, INK, OTHER, PAPER, SELF, SERIES, SOFT

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'DejaVu Sans', Arial, sans-serif"

_AXIS = {
    "gridcolor": GRID, "linecolor": AXIS, "tickcolor": AXIS, "zerolinecolor": AXIS,
    "zeroline": False, "showline": True, "ticks": "outside", "ticklen": 4, "automargin": False,
    "tickfont": {"color": SOFT, "size": 11.5},
    "title": {"font": {"size": 12, "color": SOFT}, "standoff": 6},
}  # fmt: skip

TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": FONT, "size": 12.5, "color": SOFT},
        "paper_bgcolor": PAPER, "plot_bgcolor": PAPER,
        "colorway": [OTHER, SELF, *SERIES[:5]],
        "xaxis": _AXIS, "yaxis": _AXIS,
        "barmode": "relative", "bargap": 0.12, "dragmode": "zoom",
        "title": {
            "x": 0, "xref": "paper", "xanchor": "left", "y": 1, "yref": "container", "yanchor": "top",
            "pad": {"t": 16}, "font": {"size": 16, "color": INK},
        },
        "annotationdefaults": {
            "showarrow": False, "x": 0, "y": 1, "xanchor": "left", "yanchor": "bottom", "yshift": 7,
            "font": {"size": 13.5, "color": INK},
        },
        "legend": {
            "orientation": "h", "x": 0, "xref": "container", "xanchor": "left", "y": 0, "yref": "container",
            "yanchor": "bottom", "font": {"size": 12.5, "color": INK}, "bgcolor": "rgba(0,0,0,0)",
        },
        "hoverlabel": {
            "bgcolor": PAPER, "bordercolor": AXIS, "font": {"family": FONT, "color": INK, "size": 12.5},
        },
        "modebar": {
            "bgcolor": "rgba(0,0,0,0)", "color": SOFT, "activecolor": INK, "orientation": "h",
        },
        "coloraxis": {
            "colorbar": {
                "orientation": "h", "x": 0, "xref": "container", "xanchor": "left", "y": 0, "yref": "container",
                "yanchor": "bottom", "lenmode": "pixels", "thickness": 11, "outlinewidth": 0,
                "tickfont": {"color": SOFT}, "tickangle": 0, "ticklabeloverflow": "allow",
            },
        },
    },
)  # fmt: skip
