"use strict";
// Draws the pictures of an audit. Traces and layouts come in from the page as plain data; nothing is fetched.
(() => {
  const charts = JSON.parse(document.getElementById("data").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const LIGHT = { paper: "#ffffff", ink: "#1d232b", grid: "#eceae5", axis: "#b9b5ad", series: ["#1c5f9e", "#c25a00", "#16806a", "#8a3f8f", "#8a6d00", "#b03060", "#4d5c6b"] };
  const DARK = { paper: "#1a2027", ink: "#e6e9ec", grid: "#2a323b", axis: "#566270", series: ["#7db8f0", "#f2a55c", "#5cc8a2", "#d69add", "#d8c55a", "#f08fb0", "#a9b6c4"] };
  const plain = (text) => String(text).replace(/[&<>]/g, (sign) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[sign]);

  function draw({ place, traces, x, y, layout }) {
    const t = dark.matches ? DARK : LIGHT, holder = document.getElementById(place);
    const axis = { gridcolor: t.grid, linecolor: t.axis, zerolinecolor: t.axis, tickcolor: t.axis, automargin: true };
    const data = traces.map((trace) => ({ ...trace, name: plain(trace.name ?? "") }));
    return Plotly.react(holder, data, { ...layout, height: layout.height ?? 340, width: holder.clientWidth, colorway: t.series,
      margin: { l: 60, r: 12, t: 12, b: 56 }, paper_bgcolor: t.paper, plot_bgcolor: t.paper, hoverlabel: { bgcolor: t.paper },
      font: { family: "system-ui, sans-serif", size: 12.5, color: t.ink }, legend: { orientation: "h", y: -0.25 },
      showlegend: layout.showlegend ?? traces.length > 1,
      xaxis: { ...axis, title: { text: plain(x) }, ...layout.xaxis }, yaxis: { ...axis, title: { text: plain(y) }, ...layout.yaxis } },
      { displaylogo: false, responsive: true });
  }
  const all = () => Promise.all(charts.map(draw));
  dark.addEventListener("change", all);
  all().then(() => { document.documentElement.dataset.drawn = 1; });
})();
