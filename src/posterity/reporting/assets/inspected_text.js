"use strict";
// One text under the glass: which losses pay for the key and value of a token, and what the loss at a token pays for.
(() => {
  const results = JSON.parse(document.getElementById("data").textContent).filter((result) => result.glass);
  const template = document.getElementById("glass-text").content;
  const WRITTEN = { both: ["key", "value"], key: ["key"], value: ["value"] };
  const WHAT = { both: "key and value", key: "key", value: "value" };
  const FULL = 0.5; // the share with the full colour; the strength goes by the root, so that 2 % can be seen
  const STILL = 1e-3; // where the parts cancel to less of their sizes than this, no share is known
  const MOST = 8; // rows of the short table

  // ---- colours: orange is the own loss, blue the others, purple what points against the sum
  const THEMES = {
    light: { paper: [255, 255, 255], own: [194, 90, 0], other: [28, 95, 158], against: [138, 63, 143] },
    dark: { paper: [26, 32, 39], own: [242, 165, 92], other: [125, 184, 240], against: [214, 154, 221] },
  };
  const idle = globalThis.requestIdleCallback ?? setTimeout; // to be quick later
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let printing = false;
  const theme = () => THEMES[dark.matches && !printing ? "dark" : "light"];
  for (const t of Object.values(THEMES)) for (const hue of ["own", "other", "against"]) // 256 shades from the paper to the hue
    t[hue] = Array.from({ length: 256 }, (_, step) => t.paper.map((from, i) => Math.round(from + step / 255 * (t[hue][i] - from))));
  function colour(share, own, t = theme()) {
    const step = Math.round(255 * Math.sqrt(Math.min(1, Math.abs(share) / FULL))) || 0;
    return (share < 0 ? t.against : own ? t.own : t.other)[step];
  }
  function luminance(rgb) {
    const [r, g, b] = rgb.map((value) => value <= 10 ? value / 3294 : ((value / 255 + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  }
  // Black or white, whichever can be read; the page's own ink where nothing is painted.
  function paint(element, share, own) {
    const rgb = share ? colour(share, own) : null;
    element.style.backgroundColor = rgb ? `rgb(${rgb})` : "";
    element.style.color = rgb ? (luminance(rgb) > 0.179 ? "#000" : "#fff") : "";
  }

  // ---- words and small pieces
  const percent = (share, digits = 1) => share === null ? "not known" : (100 * share).toFixed(digits).replace(/^-(?=0\.?0*$)/, "").replace("-", "−") + " %";
  const brief = (share) => Math.abs(share) < 0.0005 ? "" : percent(share, Math.abs(share) < 0.0995 ? 1 : 0);
  function short(text) { // also where one letter has many marks
    const letters = [...text.replace(/(\p{M}{3})\p{M}+/gu, "$1")];
    return letters.length > 24 ? letters.slice(0, 23).join("") + "…" : letters.join("");
  }
  const quoted = (text) => `“\u2068${short(text)}\u2069”`; // isolated, so that right-to-left letters turn nothing else around
  const say = (element, text) => { if (element.textContent !== text) element.textContent = text; }; // not read out twice
  function element(tag, text = "", attributes = {}) {
    const made = document.createElement(tag);
    made.textContent = text;
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  }
  function drawn(tag, attributes, text) {
    const made = document.createElementNS(template.querySelector("svg").namespaceURI, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text) made.textContent = text;
    return made;
  }

  // ---- numbers: matrices of size x size, row = loss, column = key; packed as glass.py says
  function unpacked(text, size) {
    const binary = atob(text), bytes = new Uint8Array(binary.length);
    for (let i = 0; i < bytes.length; i++) bytes[i] = binary.charCodeAt(i);
    return { scale: new Float32Array(bytes.buffer, 0, size), shorts: new Int16Array(bytes.buffer, 4 * size) };
  }

  function layerOf(glass, measure, stream, layer, size) {
    const layers = glass[measure][stream];
    if (typeof layers[layer] === "string") layers[layer] = unpacked(layers[layer], size);
    return layers[layer];
  }

  // Credit adds up over layers, keys and values; of norms the root of the summed squares is taken.
  function matrix({ glass, size }, { measure, written, layer }) {
    const sum = new Float64Array(size * size);
    for (const stream of WRITTEN[written]) for (const one of layer === "all" ? glass[measure][stream].keys() : [layer]) {
      const { scale, shorts } = layerOf(glass, measure, stream, one, size);
      for (let loss = 0, i = 0; loss < size; loss++) for (let key = 0; key <= loss; key++) {
        const value = shorts[i++] * scale[key];
        sum[loss * size + key] += measure === "norm" ? value * value : value;
      }
    }
    return measure === "norm" ? sum.map(Math.sqrt) : sum;
  }

  // Each column over its sum: what each loss has in the gradient of a key or value. NaN where that is about nothing.
  function shares(values, size) {
    const found = new Float64Array(size * size).fill(NaN);
    for (let key = 0; key < size; key++) {
      let whole = 0, sizes = 0;
      for (let loss = key; loss < size; loss++) { whole += values[loss * size + key]; sizes += Math.abs(values[loss * size + key]); }
      if (whole > STILL * sizes) for (let loss = key; loss < size; loss++) found[loss * size + key] = values[loss * size + key] / whole;
    }
    return found;
  }

  // What is known of a loss and a key; null where there is nothing.
  const has = (view, loss, key) => loss < view.size && key <= loss;
  const share = (view, loss, key) => { const found = view.shares[loss * view.size + key]; return Number.isFinite(found) ? found : null; };
  const ends = (view, other, at = view.at) => view.choice.toward === "payers" ? [other, at] : [at, other]; // loss, key

  // All that stands against the chosen token: later losses, or earlier keys and values; by rising lag.
  function others(view) {
    const found = [], step = view.choice.toward === "payers" ? 1 : -1;
    for (let token = view.at; token >= 0 && has(view, ...ends(view, token)); token += step) {
      const [loss, key] = ends(view, token);
      found.push({ token, lag: loss - key, share: share(view, loss, key), value: view.values[loss * view.size + key] });
    }
    return found;
  }
  const largest = (rows) => rows.filter((row) => row.share !== null).sort((a, b) => b.share - a.share);
  const total = (numbers) => numbers.reduce((sum, one) => sum + one, 0);

  // ---- sentences
  const part = (share, digits) => share === null ? "an unknown share" : percent(share, digits);
  const named = (view, token) => `token ${token} ${quoted(view.glass.tokens[token])}`;
  const next = (view, loss) => quoted(view.glass.tokens[loss + 1]);

  function sentence(view, rows) {
    const { at, size, choice } = view, what = WHAT[choice.written], name = named(view, at).replace("t", "T");
    const [top] = largest(rows.slice(1)), own = rows.length ? rows[0].share : null;
    if (choice.toward === "payers") {
      if (at === size) return `${name} is the last: no loss depends on its ${what}.`;
      if (own === null) return `${name}: no share is known, the parts of its gradient add up to about nothing.`;
      const most = top ? `, most by ${named(view, top.token)} (${percent(top.share)}), in predicting ${next(view, top.token)}` : "";
      return `${name}: own loss ${percent(own)}, later losses ${percent(top ? total(rows.slice(1).map((row) => row.share)) : 0)}${most}.`;
    }
    if (at === size) return `${name} is the last: it has no loss, the text does not say what comes next.`;
    const all = choice.measure === "credit" ? ` It brings ${percent(total(rows.map((row) => row.value)) / total(view.values))} of all credit in the text.` : "";
    return `${name}: its loss, in predicting ${next(view, at)}, pays ${part(own)} of its own ${what}`
      + (top ? `; of earlier ones most of ${named(view, top.token)} (${percent(top.share)}).` : ".") + all;
  }

  function pairWords(view, loss, key) {
    const what = WHAT[view.choice.written];
    if (loss === view.size) return `${named(view, loss).replace("t", "T")} is the last and has no loss.`;
    if (key > loss) return `The loss at ${named(view, loss)} cannot depend on the later ${named(view, key)}.`;
    const value = view.values[loss * view.size + key], unit = view.choice.measure === "credit" ? "nats²" : "nats";
    return `The loss at ${named(view, loss)}, in predicting ${next(view, loss)}, pays ${part(share(view, loss, key), 2)} of the ${what} of `
      + `${loss === key ? "the same token" : named(view, key)}: ${view.choice.measure} ${number(value)} ${unit}.`;
  }
  const number = (value) => value.toPrecision(3).replaceAll("-", "−");

  function note({ measure, layer, written }) {
    const of = `the ${written === "both" ? "keys and values" : written + "s"} of ${layer === "all" ? "all layers" : "layer " + layer}`;
    const several = layer === "all" || written === "both";
    if (measure === "credit") return `Credit for ${of}${several ? ", added up: where the gradient is larger it weighs more" : ""}.`;
    return `Norm of each loss's part in the gradient of ${of}, whatever its direction${several ? "; norms do not add up, it is the root of their summed squares" : ""}. `
      + "A share is over the sum of the norms of all losses.";
  }

  // ---- the strip of tokens
  function makeStrip(view) {
    view.glass.tokens.forEach((token, i) => {
      const button = element("button", "", { type: "button", tabindex: -1, "aria-pressed": false, "data-token": i });
      button.append(element("span", token, { class: "word" }), element("span", "", { class: "share" }));
      if (i === view.size) button.classList.add("without");
      view.strip.append(button);
      if (token.includes("⏎")) view.strip.append(element("br"));
    });
    view.buttons = [...view.strip.querySelectorAll("button")];
    const token = (event) => { const button = event.target.closest("button"); return button ? Number(button.dataset.token) : null; };
    const look = (i) => { if (i !== null) view.held === null ? choose(view, i) : point(view, ends(view, i)); };
    view.strip.addEventListener("pointermove", (event) => look(token(event)));
    view.strip.addEventListener("pointerleave", () => point(view, null));
    view.strip.addEventListener("focusin", (event) => { rove(view, token(event)); look(token(event)); });
    view.strip.addEventListener("click", (event) => { if (token(event) !== null) hold(view, view.held === token(event) ? null : token(event)); });
    view.strip.addEventListener("keydown", (event) => {
      const here = token(event), last = view.buttons.length - 1;
      const moves = { ArrowLeft: () => here - 1, ArrowRight: () => here + 1, Home: () => 0, End: () => last,
        ArrowUp: () => beside(view.buttons, here, -1), ArrowDown: () => beside(view.buttons, here, 1) };
      if (here === null || !moves[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      view.buttons[Math.max(0, Math.min(last, moves[event.key]()))].focus();
    });
  }
  function rove(view, i) {
    for (const button of view.buttons) button.tabIndex = -1;
    view.buttons[i].tabIndex = 0;
  }
  // The token above or below: the nearest of the next line.
  function beside(buttons, here, step) {
    const middle = (button) => button.offsetLeft + button.offsetWidth / 2;
    let i = here;
    while (buttons[i] && buttons[i].offsetTop === buttons[here].offsetTop) i += step;
    if (!buttons[i]) return here;
    const line = buttons[i].offsetTop, away = (j) => Math.abs(middle(buttons[j]) - middle(buttons[here]));
    let best = i;
    for (; buttons[i] && buttons[i].offsetTop === line; i += step) if (away(i) < away(best)) best = i;
    return best;
  }

  function paintStrip(view) {
    view.buttons.forEach((button, i) => {
      const [loss, key] = ends(view, i), found = has(view, loss, key) ? share(view, loss, key) : null;
      paint(button, found, loss === key);
      button.lastChild.textContent = found === null ? "" : brief(found);
      button.title = pairWords(view, loss, key);
      button.classList.toggle("chosen", i === view.at);
      button.setAttribute("aria-pressed", i === view.held);
    });
  }

  // ---- tables
  function fill(table, view, rows) {
    const payers = view.choice.toward === "payers", unit = view.choice.measure === "credit" ? "credit (nats²)" : "norm (nats)";
    const names = [payers ? "loss at" : "of token", ...(payers ? ["predicting"] : []), "lag", "share", ...(table === view.all ? [unit] : [])];
    const head = element("tr"), body = element("tbody"), top = element("thead");
    names.forEach((name, i) => head.append(element("th", name, { scope: "col", ...(i === 0 || name === "predicting" ? { class: "word" } : {}) })));
    top.append(head);
    for (const row of rows) {
      const line = element("tr"), name = element("th", row.token + " ", { scope: "row" }), part = element("td", percent(row.share, table === view.all ? 2 : 1));
      name.append(element("bdi", short(view.glass.tokens[row.token])));
      line.append(name);
      if (payers) {
        const cell = element("td", "", { class: "word" });
        cell.append(element("bdi", short(view.glass.tokens[row.token + 1])));
        line.append(cell);
      }
      paint(part, row.share, row.lag === 0);
      line.append(element("td", row.lag), part);
      if (table === view.all) line.append(element("td", number(row.value)));
      body.append(line);
    }
    table.replaceChildren(top, body);
  }

  // ---- shares by lag, as bars
  function drawCurve(view, rows) {
    const svg = view.curve, width = Math.max(200, svg.parentElement.clientWidth), height = 250, left = 46, bottom = height - 36, top = 8;
    const known = rows.map((row) => row.share ?? 0), high = Math.max(0.01, ...known), low = Math.min(0, ...known);
    const step = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10].find((one) => (high - low) / one <= 5) || high - low;
    const ceiling = Math.ceil(high / step - 1e-9) * step, floor = Math.floor(low / step + 1e-9) * step;
    const count = Math.max(8, rows.length), slot = (width - left - 4) / count;
    const y = (value) => bottom - (value - floor) / (ceiling - floor) * (bottom - top), x = (lag) => left + lag * slot;
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    for (let i = Math.round(floor / step); i <= Math.round(ceiling / step); i++) {
      svg.append(drawn("line", { class: i ? "grid" : "zero", x1: left, x2: width, y1: y(i * step), y2: y(i * step) }),
        drawn("text", { x: left - 6, y: y(i * step) + 4, "text-anchor": "end" }, percent(i * step, step < 0.01 ? 1 : 0)));
    }
    for (const row of rows) {
      const [r, g, b] = colour(Math.sign(row.share) * FULL, row.lag === 0);
      svg.append(drawn("rect", { x: x(row.lag) + 0.08 * slot, width: 0.84 * slot, y: y(Math.max(0, row.share)),
        height: Math.abs(y(row.share) - y(0)), fill: `rgb(${r},${g},${b})` }));
    }
    const every = [1, 2, 5, 10, 20, 50, 100].find((one) => one * slot >= 26) || 100;
    for (let lag = 0; lag < count; lag += every) svg.append(drawn("text", { x: x(lag + 0.5), y: bottom + 15, "text-anchor": "middle" }, String(lag)));
    svg.append(drawn("text", { x: (left + width) / 2, y: height - 4, "text-anchor": "middle" }, "lag (tokens) from key and value to loss"));
    view.lagAt = (x) => Math.floor((x - left) / slot);
  }
  function makeCurve(view) {
    view.curve.addEventListener("pointermove", (event) => {
      const row = others(view)[view.lagAt(event.clientX - view.curve.getBoundingClientRect().left)];
      point(view, row ? ends(view, row.token) : null);
    });
    view.curve.addEventListener("pointerleave", () => point(view, null));
    new ResizeObserver(() => drawCurve(view, others(view))).observe(view.curve.parentElement);
  }

  // ---- the map of all losses and keys: one pixel for each, made larger by the page
  function makeMap(view) {
    const { map, size } = view;
    map.width = map.height = size;
    map.setAttribute("aria-label", "Heat map of every loss and every token, with the numbers that the tables show token by token");
    const every = [1, 2, 5, 10, 20, 50].find((one) => size / one <= 8) || 50;
    for (let i = 0; i < size; i += every) for (const [place, side] of [[view.left, "top"], [view.below, "left"]]) {
      const tick = element("span", i);
      tick.style[side] = 100 * (i + 0.5) / size + "%";
      place.append(tick);
    }
    const cell = (event) => {
      const box = map.getBoundingClientRect(), at = (from, length) => Math.max(0, Math.min(size - 1, Math.floor(from / length * size)));
      return [at(event.clientY - box.top, box.height), at(event.clientX - box.left, box.width)];
    };
    map.addEventListener("pointermove", (event) => point(view, cell(event)));
    map.addEventListener("pointerleave", () => point(view, null));
    map.addEventListener("click", (event) => hold(view, cell(event)[view.choice.toward === "payers" ? 1 : 0]));
  }
  function paintMap(view) {
    const { map, size } = view, context = map.getContext("2d"), image = context.createImageData(size, size), t = theme();
    for (let loss = 0; loss < size; loss++) for (let key = 0; key <= loss; key++) {
      const [red, green, blue] = colour(view.shares[loss * size + key], loss === key, t), at = 4 * (loss * size + key);
      image.data[at] = red;
      image.data[at + 1] = green;
      image.data[at + 2] = blue;
      image.data[at + 3] = 255;
    }
    context.putImageData(image, 0, 0);
  }
  function band(mark, side, length, i, size) {
    mark.hidden = i === null || i >= size;
    if (mark.hidden) return;
    const across = side === "top" ? "left" : "top", wide = side === "top" ? "width" : "height";
    Object.assign(mark.style, { [side]: 100 * i / size + "%", [length]: 100 / size + "%", [across]: "-1px", [wide]: "calc(100% + 2px)" });
  }

  // ---- what is shown, and what changes it
  function update(view) {
    const rows = others(view), payers = view.choice.toward === "payers";
    paintStrip(view);
    say(view.sentence, sentence(view, rows));
    view["most-title"].textContent = payers ? `Who pays most for token ${view.at}` : `What the loss at token ${view.at} pays most for`;
    fill(view.most, view, largest(rows).slice(0, MOST));
    if (view.details.open) fill(view.all, view, rows);
    drawCurve(view, rows);
    point(view, null);
  }
  function point(view, pair) {
    const payers = view.choice.toward === "payers", peer = pair ? pair[payers ? 0 : 1] : null;
    for (const button of view.strip.querySelectorAll(".peer")) button.classList.remove("peer");
    if (pair && pair[payers ? 1 : 0] === view.at && peer !== view.at) view.buttons[peer].classList.add("peer");
    say(view.pair, pair ? pairWords(view, ...pair)
      : view.held === null ? "Point at a token, or go with the arrow keys. Click or Enter holds a token; then point at another for the number between the two."
        : `${named(view, view.held).replace("t", "T")} is held: point at another for the number between the two. Escape lets it go.`);
    band(view.row, "top", "height", pair ? pair[0] : payers ? null : view.at, view.size);
    band(view.column, "left", "width", pair ? pair[1] : payers ? view.at : null, view.size);
  }
  function choose(view, i) {
    if (view.at === i) return;
    view.at = i;
    update(view);
  }
  function hold(view, i) {
    view.held = i;
    if (i !== null) { view.at = i; rove(view, i); }
    update(view);
  }
  function reckon(view) {
    view.choice = Object.fromEntries(new FormData(view.form));
    view.values = matrix(view, view.choice);
    view.shares = shares(view.values, view.size);
    view.note.textContent = note(view.choice);
    showLegend(view);
    paintMap(view);
  }
  function showLegend(view) {
    const scale = [0.01, 0.05, 0.2, FULL], payers = view.choice.toward === "payers";
    const entry = (name, numbers, own) => {
      const made = element("span", name);
      for (const one of numbers) { const swatch = element("i", percent(one, 0)); paint(swatch, one, own); made.append(swatch); }
      return made;
    };
    view.legend.replaceChildren(entry(payers ? "own loss" : "its own", scale, true), entry(payers ? "later losses" : "those of earlier tokens", scale, false),
      ...(view.choice.measure === "credit" ? [entry("against the sum", scale.map((one) => -one), false)] : []),
      element("span", `full colour from ${percent(FULL, 0)}; · is a space`));
  }
  // To begin with: the token with the payer that is farthest off for its share.
  function first(view) {
    let best = 0, most = 0;
    for (let loss = 0; loss < view.size; loss++) for (let key = 0; key < loss; key++) {
      const worth = (share(view, loss, key) ?? 0) * (loss - key);
      if (worth > most) { most = worth; best = key; }
    }
    return best;
  }

  function show(result) {
    const root = template.firstElementChild.cloneNode(true);
    const view = { glass: result.glass, size: result.glass.tokens.length - 1, held: null, root, form: root.querySelector("form"), details: root.querySelector("details") };
    for (const part of root.querySelectorAll("[data-part]")) view[part.dataset.part] = part;
    root.querySelector("h3").textContent = results.length > 1 ? result.name : "The text, token by token";
    const layers = root.querySelector("select");
    result.glass.credit.key.forEach((_, layer) => layers.append(element("option", `layer ${layer}`, { value: layer })));
    document.getElementById("glass").append(root);
    makeStrip(view);
    makeMap(view);
    makeCurve(view);
    reckon(view);
    view.at = first(view);
    rove(view, view.at);
    update(view);
    view.form.addEventListener("change", () => { reckon(view); update(view); });
    for (const stream of WRITTEN.both) for (const layer of result.glass.norm[stream].keys()) idle(() => layerOf(result.glass, "norm", stream, layer, view.size));
    view.details.addEventListener("toggle", () => update(view));
    return view;
  }

  const views = results.map(show);
  const paintAll = () => views.forEach((view) => { showLegend(view); paintMap(view); update(view); });
  dark.addEventListener("change", paintAll);
  addEventListener("beforeprint", () => { printing = true; paintAll(); });
  addEventListener("afterprint", () => { printing = false; paintAll(); });
  addEventListener("keydown", (event) => {
    if (event.key === "Escape") for (const view of views) if (view.held !== null) hold(view, null);
  });
})();
