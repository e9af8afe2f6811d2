"use strict";
// Draws the figures of a page: each in the layout for its width and in the colours of the reader's scheme, in light
// colours for print; the view and the edges that the page's choosers ask for. Nothing is fetched.
const page = (() => {
  let data; // what the page shows, once it is unpacked; until then nothing is drawn
  let names = []; // of the figures
  const PRINTED = 680; // pixels of a figure on paper
  const scheme = matchMedia("(prefers-color-scheme: dark)");
  const listeners = { scheme: [], choice: [], drawn: [], redraw: [] };
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

  // What the chooser of a figure, or the page's chooser of edges ("readers"), asks for.
  const choice = (name) => document.querySelector(`[data-views="${name}"] input:checked`)?.value;

  // The figure that the choosers of the page ask for: a view of it, of all edges or of those that the page begins with.
  function chosen(name) {
    const figure = data.figures[name];
    const view = choice(name);
    const readers = choice("readers");
    const key = [`${view} ${readers}`, readers, view].find((candidate) => figure.views?.[candidate]);
    const other = figure.views?.[key];
    return other ? { ...other, data: changed(figure.data, other.data) } : figure;
  }

  const place = (name) => document.querySelector(`[data-chart="${name}"]`);

  async function draw(name) {
    const width = Math.floor(printing ? PRINTED : place(name).clientWidth);
    if (!width || !window.Plotly) return;
    const figure = chosen(name);
    const changes = figure.layouts.find((layout) => layout.width <= width) ?? figure.layouts.at(-1);
    const layout = { ...changed(figure.layout, changes), width, template: data.template };
    await Plotly.react(place(name), coloured(figure.data), coloured(layout), {
      displaylogo: false,
      displayModeBar: true,
      responsive: false,
      modeBarButtons: [["zoom2d", "pan2d", "resetScale2d"]],
    });
    place(name).dataset.drawn = width;
  }

  // A figure of which the page has other traces than it came with.
  function redraw(name, traces) {
    data.figures[name].data = traces;
    for (const listener of listeners.redraw) listener(name);
    return draw(name);
  }

  // ---- saving, in light colours, with the title
  function save(name, format) {
    const { data: traces, layout } = structuredClone(chosen(name));
    const { width, height } = layout;
    const figure = { data: traces, layout: { ...layout, template: structuredClone(data.template) } };
    const scale = format === "png" ? 2 : 1;
    return Plotly.downloadImage(figure, { format, width, height, scale, filename: `posterity-${name}` });
  }

  // ---- drawing again when the width, the colours or a choice change
  const drawAll = () => Promise.all(names.map(draw));
  const tell = (kind) => listeners[kind].forEach((listener) => listener());

  function schemeChanged() {
    const done = drawAll();
    tell("scheme");
    return done;
  }
  scheme.addEventListener("change", schemeChanged);

  // On paper every part is open but the tables of numbers.
  const folded = () => document.querySelectorAll("details:not(.numbers):not([open])");
  addEventListener("beforeprint", () => {
    printing = true;
    for (const details of folded()) {
      details.open = true;
      details.dataset.opened = "";
    }
    schemeChanged();
  });
  addEventListener("afterprint", () => {
    printing = false;
    for (const details of document.querySelectorAll("details[data-opened]")) {
      details.open = false;
      delete details.dataset.opened;
    }
    schemeChanged();
  });

  let waiting;
  const widths = new ResizeObserver((entries) => {
    const same = ({ target }) => !target.clientWidth || Number(target.dataset.drawn) === Math.floor(target.clientWidth);
    if (printing || entries.every(same)) return;
    clearTimeout(waiting);
    waiting = setTimeout(drawAll, 120);
  });

  for (const views of document.querySelectorAll("[data-views]")) {
    const { views: name } = views.dataset;
    views.addEventListener("change", () => {
      for (const words of document.querySelectorAll(`[data-view^="${name} "]`)) {
        words.hidden = words.dataset.view !== `${name} ${choice(name)}`;
      }
      if (name === "readers") drawAll();
      else draw(name);
      tell("choice");
    });
  }

  // A link of the index opens what it leads to.
  for (const link of document.querySelectorAll("nav a")) {
    link.addEventListener("click", () => {
      for (let part = document.querySelector(link.hash); part; part = part.parentElement) {
        if (part.localName === "details") part.open = true;
      }
      document.querySelector(`${link.hash} > details`)?.setAttribute("open", "");
    });
  }

  async function start() {
    await loaded;
    await ready;
    drawAll().then(() => {
      document.documentElement.dataset.drawn = names.length;
      for (const name of names) widths.observe(place(name));
      tell("drawn");
    });
  }

  // ---- unpacking: gzip in base64
  function unpack(text) {
    const bytes = Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  }
  const loaded = new Promise((done) => addEventListener("DOMContentLoaded", done));
  const ready = unpack(document.getElementById("data").textContent).then((text) => {
    data = JSON.parse(text);
    names = Object.keys(data.figures).filter(place);
  });

  // ---- plotly's script: packed in the page, or, in a notebook, in the first of its reports, which the others ask
  const QUESTION = "posterity: which script draws the figures?";
  const ANSWER = "posterity: this one";
  const packed = document.getElementById("plotly").textContent;

  // Unpack the script and run it; the page's policy allows that for the very same script only.
  async function run(text) {
    const script = document.createElement("script");
    script.textContent = await unpack(text);
    if (window.Plotly) return;
    document.head.append(script);
    document.getElementById("waiting").hidden = true;
    start();
  }

  function allFrames(frame, frames = []) {
    for (let number = 0; number < frame.length; number += 1) {
      frames.push(frame[number]);
      allFrames(frame[number], frames);
    }
    return frames;
  }
  addEventListener("message", ({ data: message, source }) => {
    if (message === QUESTION && packed) source.postMessage({ [ANSWER]: packed }, "*");
    if (typeof message?.[ANSWER] === "string" && !window.Plotly) run(message[ANSWER]);
  });
  function ask(times = 0) {
    if (window.Plotly) return;
    document.getElementById("waiting").hidden = times < 3;
    for (const frame of allFrames(top)) frame.postMessage(QUESTION, "*");
    setTimeout(ask, 500, times + 1);
  }
  if (packed) run(packed);
  else ask();

  return {
    get data() { return data; },
    get names() { return names; },
    colour, chosen, choice, place, save, redraw,
    onReady: (listener) => ready.then(listener),
    onSchemeChange: (listener) => listeners.scheme.push(listener),
    onChoice: (listener) => listeners.choice.push(listener),
    onRedraw: (listener) => listeners.redraw.push(listener),
    onDrawn: (listener) => listeners.drawn.push(listener),
  };
})();
