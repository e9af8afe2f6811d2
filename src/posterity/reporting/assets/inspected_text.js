"use strict";
// One text under the glass: which losses pay for the key and value of a token, and what the loss at a token pays for.
page.onReady(() => {
  const { WRITTEN, layerMatrix, matrix, shares, exists, share, pairWith, partners, largest, mostDistant } =
    inspectedNumbers;
  const { percent, brief, number, short } = inspectedWords;
  const { FULL, template, mixShades, colour, paint, element, svgElement, say, roundStep } = inspectedElements;
  const texts = page.data.inspected_texts;
  const MOST = 8; // rows of the short table
  const idle = globalThis.requestIdleCallback ?? setTimeout; // to be quick later

  // ---- the strip of tokens
  function makeStrip(view) {
    view.text.tokens.forEach((token, i) => {
      const button = element("button", "", { type: "button", tabindex: -1, "aria-pressed": false, "data-token": i });
      button.append(element("span", token, { class: "word" }), element("span", "", { class: "share" }));
      if (i === view.size) button.classList.add("without");
      view.strip.append(button);
      if (token.includes("⏎")) view.strip.append(element("br"));
    });
    view.buttons = [...view.strip.querySelectorAll("button")];
    const tokenOf = (event) => {
      const button = event.target.closest("button");
      return button ? Number(button.dataset.token) : null;
    };
    const look = (token) => {
      if (token === null) return;
      if (view.held === null) choose(view, token);
      else point(view, pairWith(view, token));
    };
    view.strip.addEventListener("pointermove", (event) => look(tokenOf(event)));
    view.strip.addEventListener("pointerleave", () => point(view, null));
    view.strip.addEventListener("focusin", (event) => {
      rove(view, tokenOf(event));
      look(tokenOf(event));
    });
    view.strip.addEventListener("click", (event) => {
      const token = tokenOf(event);
      if (token !== null) hold(view, view.held === token ? null : token);
    });
    view.strip.addEventListener("keydown", (event) => {
      const here = tokenOf(event);
      const last = view.buttons.length - 1;
      const moves = {
        ArrowLeft: () => here - 1,
        ArrowRight: () => here + 1,
        Home: () => 0,
        End: () => last,
        ArrowUp: () => beside(view.buttons, here, -1),
        ArrowDown: () => beside(view.buttons, here, 1),
      };
      if (here === null || !moves[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      view.buttons[Math.max(0, Math.min(last, moves[event.key]()))].focus();
    });
  }

  function rove(view, token) {
    for (const button of view.buttons) button.tabIndex = -1;
    view.buttons[token].tabIndex = 0;
  }

  // The token above or below: the nearest of the next line.
  function beside(buttons, here, step) {
    const middle = (button) => button.offsetLeft + button.offsetWidth / 2;
    let i = here;
    while (buttons[i] && buttons[i].offsetTop === buttons[here].offsetTop) i += step;
    if (!buttons[i]) return here;
    const line = buttons[i].offsetTop;
    const distance = (token) => Math.abs(middle(buttons[token]) - middle(buttons[here]));
    let nearest = i;
    for (; buttons[i] && buttons[i].offsetTop === line; i += step) {
      if (distance(i) < distance(nearest)) nearest = i;
    }
    return nearest;
  }

  function paintStrip(view) {
    view.buttons.forEach((button, token) => {
      const [loss, key] = pairWith(view, token);
      const value = exists(view, loss, key) ? share(view, loss, key) : null;
      paint(button, value, loss === key);
      button.lastChild.textContent = value === null ? "" : brief(value);
      button.title = inspectedWords.pair(view, loss, key);
      button.classList.toggle("chosen", token === view.token);
      button.setAttribute("aria-pressed", token === view.held);
    });
  }

  // ---- tables
  function fillTable(table, view, rows) {
    const losses = view.choice.toward === "losses";
    const { measure } = view.choice;
    const names = [losses ? "loss at" : "of token", ...(losses ? ["predicting"] : []), "lag", "share"];
    if (table === view.all) names.push(`${measure} (${inspectedWords.unit(measure)})`);
    const line = element("tr");
    names.forEach((name, i) => {
      const word = i === 0 || name === "predicting" ? { class: "word" } : {};
      line.append(element("th", name, { scope: "col", ...word }));
    });
    const head = element("thead");
    const body = element("tbody");
    head.append(line);
    body.append(...rows.map((row) => tableRow(view, row, losses, table === view.all)));
    table.replaceChildren(head, body);
  }

  function tableRow(view, row, losses, complete) {
    const line = element("tr");
    const name = element("th", `${row.token} `, { scope: "row" });
    name.append(element("bdi", short(view.text.tokens[row.token])));
    line.append(name);
    if (losses) {
      const following = element("td", "", { class: "word" });
      following.append(element("bdi", short(view.text.tokens[row.token + 1])));
      line.append(following);
    }
    const cell = element("td", percent(row.share, complete ? 2 : 1));
    paint(cell, row.share, row.lag === 0);
    line.append(element("td", row.lag), cell);
    if (complete) line.append(element("td", number(row.value)));
    return line;
  }

  // ---- shares by lag, as bars
  function drawCurve(view, rows) {
    const svg = view.curve;
    const [height, left, top] = [250, 46, 8];
    const width = Math.max(200, svg.parentElement.clientWidth);
    const bottom = height - 36;
    const numbers = rows.map((row) => row.share ?? 0);
    const high = Math.max(0.01, ...numbers);
    const low = Math.min(0, ...numbers);
    const steps = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, high - low];
    const step = roundStep(steps, (size) => (high - low) / size <= 5);
    const ceiling = Math.ceil(high / step - 1e-9) * step;
    const floor = Math.floor(low / step + 1e-9) * step;
    const count = Math.max(8, rows.length);
    const slot = (width - left - 4) / count;
    const y = (value) => bottom - ((value - floor) / (ceiling - floor)) * (bottom - top);
    const x = (lag) => left + lag * slot;
    const word = (text, place) => svgElement("text", place, text);
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    for (let i = Math.round(floor / step); i <= Math.round(ceiling / step); i++) {
      const level = y(i * step);
      svg.append(
        svgElement("line", { class: i ? "grid" : "zero", x1: left, x2: width, y1: level, y2: level }),
        word(percent(i * step, step < 0.01 ? 1 : 0), { x: left - 6, y: level + 4, "text-anchor": "end" }),
      );
    }
    for (const row of rows) {
      const fill = `rgb(${colour(Math.sign(row.share) * FULL, row.lag === 0)})`;
      const bar = { y: y(Math.max(0, row.share)), height: Math.abs(y(row.share) - y(0)) };
      svg.append(svgElement("rect", { x: x(row.lag) + 0.08 * slot, width: 0.84 * slot, ...bar, fill }));
    }
    const every = roundStep([1, 2, 5, 10, 20, 50, 100], (lags) => lags * slot >= 26);
    for (let lag = 0; lag < count; lag += every) {
      svg.append(word(String(lag), { x: x(lag + 0.5), y: bottom + 15, "text-anchor": "middle" }));
    }
    const title = { x: (left + width) / 2, y: height - 4, "text-anchor": "middle" };
    svg.append(word("lag (tokens) from key and value to loss", title));
    view.lagAt = (place) => Math.floor((place - left) / slot);
  }

  function makeCurve(view) {
    view.curve.addEventListener("pointermove", (event) => {
      const row = partners(view)[view.lagAt(event.clientX - view.curve.getBoundingClientRect().left)];
      point(view, row ? pairWith(view, row.token) : null);
    });
    view.curve.addEventListener("pointerleave", () => point(view, null));
    new ResizeObserver(() => drawCurve(view, partners(view))).observe(view.curve.parentElement);
  }

  // ---- the map of all losses and keys: one pixel for each, made larger by the page
  function makeMap(view) {
    const { map, size } = view;
    map.width = map.height = size;
    const label = "Heat map of every loss and every token, with the numbers that the tables show token by token";
    map.setAttribute("aria-label", label);
    const every = roundStep([1, 2, 5, 10, 20, 50], (tokens) => size / tokens <= 8);
    for (let token = 0; token < size; token += every) {
      for (const [ticks, side] of [
        [view.left, "top"],
        [view.below, "left"],
      ]) {
        const tick = element("span", token);
        tick.style[side] = `${(100 * (token + 0.5)) / size}%`;
        ticks.append(tick);
      }
    }
    const cell = (event) => {
      const box = map.getBoundingClientRect();
      const index = (distance, length) => Math.max(0, Math.min(size - 1, Math.floor((distance / length) * size)));
      return [index(event.clientY - box.top, box.height), index(event.clientX - box.left, box.width)];
    };
    map.addEventListener("pointermove", (event) => point(view, cell(event)));
    map.addEventListener("pointerleave", () => point(view, null));
    map.addEventListener("click", (event) => {
      const [loss, key] = cell(event);
      hold(view, view.choice.toward === "losses" ? key : loss);
    });
  }

  function paintMap(view) {
    const { map, size } = view;
    const context = map.getContext("2d");
    const image = context.createImageData(size, size);
    for (let loss = 0; loss < size; loss++) {
      for (let key = 0; key <= loss; key++) {
        const index = loss * size + key;
        const [red, green, blue] = colour(view.shares[index], loss === key);
        image.data[4 * index] = red;
        image.data[4 * index + 1] = green;
        image.data[4 * index + 2] = blue;
        image.data[4 * index + 3] = 255;
      }
    }
    context.putImageData(image, 0, 0);
  }

  // Mark a row or a column of the map.
  function mark(band, side, length, token, size) {
    band.hidden = token === null || token >= size;
    if (band.hidden) return;
    const [across, wide] = side === "top" ? ["left", "width"] : ["top", "height"];
    const along = { [side]: `${(100 * token) / size}%`, [length]: `${100 / size}%` };
    Object.assign(band.style, { ...along, [across]: "-1px", [wide]: "calc(100% + 2px)" });
  }

  // ---- what is shown, and what changes it
  function update(view) {
    const rows = partners(view);
    const losses = view.choice.toward === "losses";
    paintStrip(view);
    say(view.sentence, inspectedWords.sentence(view, rows));
    say(view.readers, inspectedWords.readers(view));
    view["most-title"].textContent = losses
      ? `Who pays most for token ${view.token}`
      : `What the loss at token ${view.token} pays most for`;
    fillTable(view.most, view, largest(rows).slice(0, MOST));
    if (view.details.open) fillTable(view.all, view, rows);
    drawCurve(view, rows);
    point(view, null);
  }

  // Show the number of a loss and a key, or none.
  function point(view, pair) {
    const losses = view.choice.toward === "losses";
    for (const button of view.strip.querySelectorAll(".peer")) button.classList.remove("peer");
    if (pair) {
      const [chosen, peer] = losses ? [pair[1], pair[0]] : pair;
      if (chosen === view.token && peer !== view.token) view.buttons[peer].classList.add("peer");
    }
    say(view.pair, pair ? inspectedWords.pair(view, ...pair) : inspectedWords.hint(view));
    const [loss, key] = pair ?? (losses ? [null, view.token] : [view.token, null]);
    mark(view.row, "top", "height", loss, view.size);
    mark(view.column, "left", "width", key, view.size);
  }

  function choose(view, token) {
    if (view.token === token) return;
    view.token = token;
    update(view);
  }

  function hold(view, token) {
    view.held = token;
    if (token !== null) {
      view.token = token;
      rove(view, token);
    }
    update(view);
  }

  function reckon(view) {
    view.choice = Object.fromEntries(new FormData(view.form));
    view.values = matrix(view.text, view.choice);
    view.shares = shares(view.values, view.size);
    view.note.textContent = inspectedWords.note(view.choice);
    showLegend(view);
    paintMap(view);
  }

  function showLegend(view) {
    const scale = [0.01, 0.05, 0.2, FULL];
    const losses = view.choice.toward === "losses";
    const entry = (name, numbers, own) => {
      const line = element("span", name);
      for (const share of numbers) {
        const swatch = element("i", percent(share, 0));
        paint(swatch, share, own);
        line.append(swatch);
      }
      return line;
    };
    view.legend.replaceChildren(
      entry(losses ? "own loss" : "its own", scale, true),
      entry(losses ? "later losses" : "those of earlier tokens", scale, false),
    );
    if (view.choice.measure === "credit") {
      view.legend.append(
        entry(
          "against the sum",
          scale.map((share) => -share),
          false,
        ),
      );
    }
    view.legend.append(element("span", `full colour from ${percent(FULL, 0)}; · is a space`));
  }

  function show(text) {
    const root = template.firstElementChild.cloneNode(true);
    const [form, details] = [root.querySelector("form"), root.querySelector("details")];
    const view = { text, size: text.tokens.length - 1, held: null, root, form, details };
    for (const part of root.querySelectorAll("[data-part]")) view[part.dataset.part] = part;
    root.querySelector("h3").textContent = texts.length > 1 ? text.name : "The text, token by token";
    const layers = root.querySelector("select");
    text.credit.key.forEach((_, layer) => layers.append(element("option", `layer ${layer}`, { value: layer })));
    document.getElementById("inspected").append(root);
    makeStrip(view);
    makeMap(view);
    makeCurve(view);
    reckon(view);
    view.token = mostDistant(view);
    rove(view, view.token);
    update(view);
    form.addEventListener("change", () => {
      reckon(view);
      update(view);
    });
    details.addEventListener("toggle", () => update(view));
    for (const stream of WRITTEN.both) {
      for (const layer of text.norm[stream].keys()) idle(() => layerMatrix(text, "norm", stream, layer));
    }
    return view;
  }

  mixShades();
  const views = texts.map(show);
  page.onSchemeChange(() => {
    mixShades();
    for (const view of views) {
      showLegend(view);
      paintMap(view);
      update(view);
    }
  });
  addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    for (const view of views) if (view.held !== null) hold(view, null);
  });
});
