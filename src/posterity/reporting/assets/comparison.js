"use strict";
// Draws the gap by position of compared runs. Plain numbers come in from the page; nothing is fetched.
(() => {
  const { units, arms } = JSON.parse(document.getElementById("data").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)"), place = document.getElementById("gap");
  const LIGHT = { paper: "#ffffff", ink: "#1d232b", grid: "#eceae5", axis: "#b9b5ad", series: ["#c25a00", "#1c5f9e", "#16806a", "#8a3f8f", "#8a6d00", "#b03060", "#4d5c6b"] };
  const DARK = { paper: "#1a2027", ink: "#e6e9ec", grid: "#2a323b", axis: "#566270", series: ["#f2a55c", "#7db8f0", "#5cc8a2", "#d69add", "#d8c55a", "#f08fb0", "#a9b6c4"] };
  const faint = (colour) => colour + "30";
  const plain = (text) => text.replace(/[&<>]/g, (sign) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[sign]);

  function draw() {
    const t = dark.matches ? DARK : LIGHT;
    const data = arms.flatMap(({ name, gap, error }, number) => {
      const colour = t.series[number % t.series.length], x = gap.map((_, position) => position);
      const edge = (sign) => ({ type: "scatter", mode: "lines", x, y: gap.map((one, i) => error[i] === null ? null : one + sign * error[i]),
        line: { width: 0, color: colour }, hoverinfo: "skip", showlegend: false, legendgroup: name });
      return [edge(-1), { ...edge(1), fill: "tonexty", fillcolor: faint(colour) },
        { type: "scatter", mode: x.length < 2 ? "markers" : "lines", name: plain(name), legendgroup: name, showlegend: true, x, y: gap, line: { color: colour, width: 2.2 }, hovertemplate: "%{y:.4f}" }];
    });
    const axis = { gridcolor: t.grid, linecolor: t.axis, zerolinecolor: t.axis, tickcolor: t.axis };
    return Plotly.react(place, data, { height: 420, width: place.clientWidth, margin: { l: 64, r: 12, t: 16, b: 60 }, hovermode: "x unified", paper_bgcolor: t.paper, plot_bgcolor: t.paper,
      font: { family: "system-ui, sans-serif", size: 12.5, color: t.ink }, hoverlabel: { bgcolor: t.paper },
      xaxis: { ...axis, title: { text: "position" } }, yaxis: { ...axis, title: { text: "gap (" + units + ")" }, zeroline: true }, legend: { orientation: "h", y: -0.2 } }, { displaylogo: false, responsive: true });
  }
  dark.addEventListener("change", draw);
  draw().then(() => { document.documentElement.dataset.drawn = 1; });
})();
