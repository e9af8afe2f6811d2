"use strict";
// Draws the figures of a page: each in the layout for its width and in the colours of the reader's scheme, in light
// colours for print; saves one as SVG or PNG. Figures come in from the page as plotly takes them; nothing is fetched.
const page = (() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const PRINTED = 680; // pixels of a figure on paper
  const scheme = matchMedia("(prefers-color-scheme: dark)");
  const listeners = [];
  let printing = false;

  // ---- colours: every figure is in light ones
  const isDark = () => scheme.matches && !printing;
  const colour = (light) => (isDark() ? (data.dark[light.slice(0, 7)] ?? light.slice(0, 7)) + light.slice(7) : light);

  // A copy of a figure, or of a part of it, whose attributes named as colours have those of the scheme.
  function coloured(value, name = "") {
    if (typeof value === "string") return /color/.test(name) ? colour(value) : value;
    if (Array.isArray(value)) return value.map((entry) => coloured(entry, name));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, entry]) => [key, coloured(entry, key)]));
  }

  // ---- figures
  // A value with changes: an object's by key, null for a key that goes; a list's by index; else the new value.
  function changed(value, changes) {
    if (changes === null || typeof changes !== "object" || Array.isArray(changes)) return changes;
    const copy = Array.isArray(value) ? [...value] : { ...value };
    for (const [key, change] of Object.entries(changes)) {
      if (change === null) delete copy[key];
      else copy[key] = changed(copy[key], change);
    }
    return copy;
  }

  // The figure that the choosers of the page ask for.
  function chosen(name) {
    const figure = data.figures[name];
    const view = document.querySelector(`[data-views="${name}"] input:checked`)?.value;
    const other = figure.views?.[view];
    return other ? { ...other, data: changed(figure.data, other.data) } : figure;
  }

  const place = (name) => document.querySelector(`[data-chart="${name}"]`);

  async function draw(name) {
    const figure = chosen(name);
    const width = Math.floor(printing ? PRINTED : place(name).clientWidth);
    if (!width) return;
    const changes = figure.layouts.find((layout) => layout.width <= width) ?? figure.layouts.at(-1);
    const layout = { ...changed(figure.layout, changes), width, template: data.template };
    await Plotly.react(place(name), coloured(figure.data), coloured(layout), {
      displaylogo: false,
      displayModeBar: true,
      responsive: false,
      modeBarButtons: [
        ["zoom2d", "pan2d", "resetScale2d"],
        [button(name, "svg"), button(name, "png")],
      ],
    });
    place(name).dataset.drawn = width;
  }

  // ---- saving, in light colours, with the title
  const ICONS = {
    svg: "M5 3h9l5 5v13H5V3zm8 2v4h4M8 17l3-5 2.5 3.5 1.5-2 2 3.5H8z",
    png: "M9 4l-1.5 2H4v13h16V6h-3.5L15 4H9zm3 4.5a4 4 0 110 8 4 4 0 010-8zm0 2a2 2 0 100 4 2 2 0 000-4z",
  };
  const button = (name, format) => ({
    name: `save-${format}`,
    title: `Save as ${format.toUpperCase()}`,
    icon: { width: 24, height: 24, path: ICONS[format] },
    click: () => save(name, format),
  });

  function save(name, format) {
    const { data: traces, layout } = structuredClone(chosen(name));
    const { width, height } = layout;
    const figure = { data: traces, layout: { ...layout, template: structuredClone(data.template) } };
    const scale = format === "png" ? 2 : 1;
    return Plotly.downloadImage(figure, { format, width, height, scale, filename: `posterity-${name}` });
  }

  // ---- drawing again when the width, the colours or the view change
  const names = Object.keys(data.figures).filter(place);
  const drawAll = () => Promise.all(names.map(draw));

  function schemeChanged() {
    drawAll();
    for (const listener of listeners) listener();
  }
  scheme.addEventListener("change", schemeChanged);
  for (const event of ["beforeprint", "afterprint"]) {
    addEventListener(event, () => {
      printing = event === "beforeprint";
      schemeChanged();
    });
  }

  let waiting;
  const widths = new ResizeObserver((entries) => {
    const same = ({ target }) => Number(target.dataset.drawn) === Math.floor(target.clientWidth);
    if (printing || entries.every(same)) return;
    clearTimeout(waiting);
    waiting = setTimeout(drawAll, 120);
  });

  for (const views of document.querySelectorAll("[data-views]")) {
    views.addEventListener("change", ({ target }) => {
      for (const words of document.querySelectorAll("[data-view]")) words.hidden = words.dataset.view !== target.value;
      draw(views.dataset.views);
    });
  }

  drawAll().then(() => {
    document.documentElement.dataset.drawn = names.length;
    for (const name of names) widths.observe(place(name));
  });
  return { data, colour, onSchemeChange: (listener) => listeners.push(listener) };
})();
