"use strict";
// Draws the charts of a Posterity report. Plain numbers come in from the page; nothing is fetched.
(() => {
  const results = JSON.parse(document.getElementById("data").textContent);
  const STREAMS = ["query", "key", "value"], WRITTEN = ["key", "value"];
  const one = results.length === 1;
  let view = "doubling", room = 300; // width of one panel, in pixels

  // ---- colours: orange is self, blue is others, in every chart; several results take other colours
  const THEMES = {
    light: {
      paper: "#ffffff", ink: "#1d232b", soft: "#59636f", grid: "#eceae5", empty: "#dcdad5", axis: "#b9b5ad",
      self: "#c25a00", other: "#1c5f9e", count: "#7a828c", attention: "#2a8a6a", mean: "#8a3f8f",
      late: "#79b0dc", depth: ["#e0b23c", "#1d8a72", "#2b3f9c"],
      reach: [[0, "#f7eeb0"], [0.25, "#a9d9a8"], [0.5, "#45a9a6"], [0.75, "#1f6fa3"], [1, "#10306b"]],
      scale: [[0, "#0f4c86"], [0.125, "#2f72b0"], [0.25, "#6ba3d3"], [0.375, "#b3d1e9"], [0.5, "#f4f1ea"],
        [0.625, "#f8cfa0"], [0.75, "#ec9a4a"], [0.875, "#c9640f"], [1, "#8a3d00"]],
      series: ["#16806a", "#8a3f8f", "#8a6d00", "#b03060", "#4d5c6b", "#3f4fb0"],
    },
    dark: {
      paper: "#1a2027", ink: "#e6e9ec", soft: "#a3adb8", grid: "#2a323b", empty: "#4a525c", axis: "#566270",
      self: "#f2a55c", other: "#7db8f0", count: "#98a2ad", attention: "#5cc8a2", mean: "#d69add",
      late: "#3b6d9c", depth: ["#f0d478", "#3fae93", "#7d8fe8"],
      reach: [[0, "#1c3a63"], [0.25, "#216f92"], [0.5, "#35a58f"], [0.75, "#9ad07a"], [1, "#fbf0a6"]],
      scale: [[0, "#a9d2f8"], [0.125, "#7db8f0"], [0.25, "#4a8ecb"], [0.375, "#2f5f8c"], [0.5, "#252c34"],
        [0.625, "#6d4a26"], [0.75, "#b06f2c"], [0.875, "#ee9a45"], [1, "#ffd0a0"]],
      series: ["#5cc8a2", "#d69add", "#d8c55a", "#f08fb0", "#a9b6c4", "#9fadff"],
    },
  };
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let printing = false;
  const theme = () => THEMES[dark.matches && !printing ? "dark" : "light"];

  // ---- small pieces
  // plotly reads a little HTML in its texts; names are shown as they are
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const short = (text, length) => text.length > length ? text.slice(0, length - 1) + "…" : text;
  const zip = (first, second, join) => first.map((value, i) => value === null || second[i] === null ? null : join(value, second[i]));
  const percent = (share, error) => share === null ? "not known"
    : (100 * share).toFixed(1) + (error === null || error === undefined ? "" : " ± " + (100 * error).toFixed(1)) + " %";
  // A colour between those of a list, at 0 to 1.
  function mix(colours, at) {
    const place = at * (colours.length - 1), from = Math.min(Math.floor(place), colours.length - 2);
    const parts = (colour) => [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));
    return "rgb(" + zip(parts(colours[from]), parts(colours[from + 1]), (a, b) => Math.round(a + (place - from) * (b - a))).join(",") + ")";
  }
  const faint = (colour) => colour + "33";
  const dashes = ["solid", "dash", "dot", "dashdot"];
  const having = (part) => results.filter((result) => result[part]);
  const steps = (layers) => layers > 10 ? {} : { dtick: 1 };
  // The name of a result, cut to a length; with its number where the cut names of two would be equal.
  function nameOf(result, length) {
    const cut = short(result.name, length), same = results.filter((other) => short(other.name, length) === cut);
    return same.length > 1 ? `${results.indexOf(result) + 1}: ${short(result.name, length - 3)}` : cut;
  }
  const panelTitle = (name, result) => one ? plain(name) : `${plain(name)} · ${plain(nameOf(result, 26))}`;

  function line(name, x, y, colour, more = {}) {
    return { type: "scatter", mode: "lines", name: plain(name), legendgroup: name, x, y, connectgaps: false,
      legendrank: /^(counting|attention)/.test(name) ? 1001 : 1000,
      line: { color: colour, width: 2.2, dash: more.dash || "solid" },
      hovertemplate: "%{y:" + (more.format || ".1%") + "}", ...more.trace };
  }

  function band(name, x, y, error, colour) {
    if (error.every((value) => value === null)) return [];
    const edge = (sign) => ({ type: "scatter", mode: "lines", x, y: zip(y, error, (a, b) => a + sign * b), legendgroup: name,
      line: { width: 0, color: colour }, hoverinfo: "skip", showlegend: false });
    return [edge(-1), { ...edge(1), fill: "tonexty", fillcolor: faint(colour) }];
  }

  // The axis of lags and positions: number + 1 on a log scale; a bin is drawn at its geometric middle.
  const middle = (start, end) => start.map((from, i) => Math.sqrt((from + 1) * (end[i] + 2)));
  const doublings = (start, end) => start.map((from, i) => Math.log2((end[i] + 2) / (from + 1)));
  function logAxis(last, zero, title) {
    const shown = [0];
    const step = room / Math.log2(last + 2) < 30 ? 4 : 2;
    for (let number = 1; number <= last; number *= step) shown.push(number);
    return { type: "log", title, tickvals: shown.map((number) => Math.sqrt((number + 1) * (number + 2))),
      ticktext: shown.map((number) => number ? String(number) : zero), range: [0, Math.log10(last + 2)] };
  }
  // Shares of one number for a log scale; what is below a thousandth of an even part is zero, negative or rounding.
  const single = (share, start, end) => share.map((value, i) => {
    const density = value === null ? null : value / (end[i] - start[i] + 1);
    return density > 1e-3 / (end.at(-1) + 1) ? density : null;
  });
  // As many of these numbers, from the last one back, as have their place on a log scale of that width.
  function spaced(numbers, wide) {
    const step = Math.ceil(numbers.length / Math.max(1, Math.floor(wide / 34)));
    return numbers.filter((_, i) => (numbers.length - 1 - i) % step === 0);
  }
  const bins = (start, end) => start.map((from, i) => from === end[i] ? String(from) : from + "–" + end[i]);

  // ---- panels of each chart: { title, traces, x, y }
  // layers by heads: `z` in colours; grey where weak; `marked` is one more heatmap above
  function headsPanel(t, title, result, { z, weak, text, reason, marked = [] }) {
    const each = (of) => weak.map((row, l) => row.map((value, h) => of(value, l, h)));
    const words = each((value, l, h) => value === null ? "" : text(l, h));
    const heads = result.heads > 1 ? { dtick: Math.ceil(result.heads / 10) } : { tickvals: [0] };
    return {
      title,
      traces: [
        { type: "heatmap", z: each((value) => value ? 1 : null), showscale: false,
          colorscale: [[0, t.empty], [1, t.empty]], hoverinfo: "skip", xgap: 1, ygap: 1 },
        { type: "heatmap", z: each((value, l, h) => value ? null : z[l][h]),
          coloraxis: "coloraxis", text: words, hovertemplate: "%{text}<extra></extra>", xgap: 1, ygap: 1 },
        { type: "heatmap", z: each((value, l, h) => value ? 0 : null), showscale: false,
          opacity: 0, text: words, hovertemplate: `%{text}<br>${reason}<extra></extra>` },
        ...marked,
      ],
      x: { title: "head", showgrid: false, ...heads },
      y: { title: "layer", showgrid: false, dtick: Math.max(1, Math.ceil(result.layers / 12)) },
    };
  }
  const ofStream = (part, stream) => Object.fromEntries(Object.entries(part).map(([name, all]) => [name, all[stream]]));

  function mapPanels(t) {
    return STREAMS.flatMap((stream) => results.map((result) => {
      const { share, error, portion, weak } = ofStream(result.map, stream);
      const text = (l, h) => `layer ${l}, head ${h}<br>self share ${percent(share[l][h], error[l][h])}<br>credit ${portion[l][h] === null ? "not known" : portion[l][h].toFixed(2)} of an equal part`;
      return headsPanel(t, panelTitle(stream, result), result, { z: share, weak, text, reason: "credit too small or too uncertain" });
    }));
  }
  const mapColours = (t) => ({ colorscale: t.scale, cmin: 0, cmax: 1,
    colorbar: { tickvals: [0, 0.25, 0.5, 0.75, 1], ticktext: ["0 % self", "25 %", "50 %", "75 %", "100 % self"] } });

  const VIEWS = {
    doubling: { title: "share per doubling of lag + 1", of: (share, start, end) => zip(share, doublings(start, end), (a, b) => a / b) },
    lag: { title: "share per lag", log: true, of: single },
    sum: { title: "share up to this lag", of: (share) => { let sum = 0; return share.map((value) => sum = value === null || sum === null ? null : sum + value); } },
  };

  function lagPanels(t) {
    const { title, of, log } = VIEWS[view];
    const same = results.every((result) => JSON.stringify(result.lags.counted) === JSON.stringify(results[0].lags.counted));
    const last = Math.max(...results.map((result) => result.lags.end.at(-1)));
    return STREAMS.map((stream) => {
      const traces = [];
      results.forEach((result, number) => {
        const { start, end, share, error, counted, attention } = result.lags;
        const colour = one ? t.other : t.series[number % t.series.length], label = one ? "credit" : nameOf(result, 40);
        const x = view === "sum" ? end.map((to) => Math.sqrt((to + 1) * (to + 2))) : middle(start, end);
        const y = of(share[stream], start, end), names = bins(start, end);
        const lag = (more) => ({ ...more, customdata: names, hovertemplate: "lag %{customdata}: %{y:.3~p}" });
        if (view === "doubling") traces.push(...band(label, x, y, of(error[stream], start, end), colour));
        if (one) traces.push(line("attention", x, of(attention, start, end), t.attention, { dash: "dot", trace: lag({}) }));
        if (number === 0 || !same) traces.push(line(same ? "counting edges alone" : "counting, " + label, x, of(counted, start, end),
          same ? t.count : colour, { dash: "dash", trace: lag({ line: { color: same ? t.count : colour, width: 1.4, dash: "dash" } }) }));
        traces.push(line(label, x, y, colour, { trace: lag({ line: { color: colour, width: 2.2 } }) }));
        const bar = view === "doubling" && error[stream][0] !== null ? { error_y: { array: [error[stream][0]], thickness: 1.5, color: one ? t.self : colour } } : {};
        traces.push({ type: "scatter", mode: "markers", name: one ? "credit of the self edge" : plain(label), legendgroup: one ? "self" : label, showlegend: one,
          x: [x[0]], y: [y[0]], hoverinfo: "skip", marker: { size: 9, color: one ? t.self : colour, line: { width: 1.5, color: t.paper } }, ...bar });
      });
      return { title: stream, traces, x: logAxis(last, "self", "lag (tokens; log scale of lag + 1)"),
        y: { title, tickformat: log ? ".3~p" : ".0%", type: log ? "log" : "linear", dtick: log ? 1 : undefined,
          rangemode: "tozero", ...(view === "sum" ? { range: [0, 1.05] } : {}) } };
    });
  }

  function layerAxis(given = results) {
    const same = given.every((result) => result.layers === given[0].layers);
    if (same) return { of: (result) => result.modules.map((_, i) => i), axis: { title: "layer", ...steps(given[0].layers) } };
    return { of: (result) => result.modules.map((_, i) => i / Math.max(1, result.layers - 1)), axis: { title: "depth (first layer 0, last layer 1)" } };
  }

  function layerPanels(t) {
    const { of, axis } = layerAxis();
    const same = results.every((result) => JSON.stringify(result.layer.counted) === JSON.stringify(results[0].layer.counted));
    return STREAMS.map((stream) => ({
      title: stream, x: axis, y: { title: "self share", tickformat: ".0%", rangemode: "tozero" },
      traces: results.flatMap((result, number) => {
        const colour = one ? t.self : t.series[number % t.series.length], label = one ? "self share" : nameOf(result, 40), x = of(result);
        const counted = number === 0 || !same ? [line("counting edges alone", x, result.layer.counted, same ? t.count : colour,
          { dash: "dash", trace: { showlegend: number === 0, line: { color: same ? t.count : colour, width: 1.4, dash: "dash" } } })] : [];
        const { share, error } = result.layer;
        return [...band(label, x, share[stream], error[stream], colour), ...counted, line(label, x, share[stream], colour, dotted(x))];
      }),
    }));
  }
  const dotted = (x) => ({ trace: x.length < 3 ? { mode: "markers" } : { mode: "lines+markers", marker: { size: 4.5 } } });

  function positionLine(label, start, end, share, colour, counted = false) {
    const trace = { customdata: bins(start, end), hovertemplate: "position %{customdata}: %{y:.3~p}" }, x = middle(start, end), y = single(share, start, end);
    if (counted) return line(label, x, y, colour, { trace: { ...trace, line: { color: colour, width: 1.4, dash: "dash" } } });
    return line(label, x, y, colour, { trace: { ...trace, mode: "lines+markers", marker: { size: x.map((_, i) => i ? 3 : 9), color: colour, opacity: 1, line: { width: 0 } } } });
  }
  const positionAxes = (end) => ({ x: logAxis(end.at(-1), "first", "position (tokens; log scale of position + 1)"),
    y: { title: "share of one position", type: "log", dtick: 1, tickformat: ".3~p" } });

  function positionPanels(t) {
    return STREAMS.flatMap((stream) => results.map((result) => {
      const { start, end, counted, self, other } = result.position;
      const traces = counted ? [positionLine("counting edges alone", start, end, counted[stream], t.count, true)] : [];
      traces.push(positionLine("other edges", start, end, other[stream], t.other), positionLine("self edge", start, end, self[stream], t.self));
      return { title: panelTitle(stream, result), traces, ...positionAxes(end) };
    }));
  }

  function firstPanels(t) {
    const { of, axis } = layerAxis();
    return STREAMS.map((stream) => ({
      title: stream, x: axis, y: { title: "share of the first position", tickformat: ".0%", rangemode: "tozero" },
      traces: results.flatMap((result, number) => {
        const colour = one ? t.other : t.series[number % t.series.length], label = one ? "credit" : nameOf(result, 40), x = of(result);
        const { share, error, attention } = result.first;
        const weight = one ? "attention weight on the first key" : "attention, " + label;
        const forward = stream === "query" ? [] : [line(weight, x, attention, one ? t.attention : colour, { dash: "dot" })];
        return [...band(label, x, share[stream], error[stream], colour), ...forward, line(label, x, share[stream], colour, dotted(x))];
      }),
    }));
  }

  const NAMES = { query: "W_Q", key: "W_K", value: "W_V" };
  function weightPanels(draw, y) {
    const panels = [];
    for (const stream of STREAMS) for (const result of having("weights")) {
      const x = result.modules.map((_, i) => i);
      panels.push({ title: panelTitle(NAMES[stream], result), traces: draw(result.weights, stream, x), x: { title: "layer", ...steps(result.layers) }, y });
    }
    return panels;
  }
  const weights = (t) => weightPanels((found, stream, x) => [
    ...band("single windows", x, found.share[stream], found.error[stream], t.attention),
    line("single windows", x, found.share[stream], t.attention, dotted(x)),
    line("mean gradient", x, found.mean[stream], t.mean, { ...dotted(x), dash: "dash" }),
  ], { title: "self share of the squared norm", tickformat: ".0%", rangemode: "tozero" });
  const agreement = (t) => weightPanels((found, stream, x) => ["self", "other", "whole"].map((part, number) =>
    line({ self: "self part", other: "other part", whole: "whole gradient" }[part], x, found.agreement[part][stream],
      { self: t.self, other: t.other, whole: t.ink }[part], { ...dotted(x), dash: dashes[number], format: ".3f" })),
  { title: "agreement (1 = all equal)", rangemode: "tozero" });

  // ---- who pays
  const zeroLine = (t) => ({ zeroline: true, zerolinecolor: t.axis });
  function payerPanels(t) {
    const parts = [["own", "own loss", t.self], ["self later", "self edge, later losses", t.late], ["future", "future edges", t.other]];
    return WRITTEN.flatMap((written) => having("payers").map((result) => {
      const { share, error } = result.payers;
      return { title: panelTitle(written, result), x: { title: "layer", ...steps(result.layers) },
        y: { title: "share of the credit", tickformat: ".0%", rangemode: "tozero", ...zeroLine(t) },
        traces: parts.map(([part, label, color]) => ({ type: "bar", name: label, legendgroup: label, x: result.modules.map((_, i) => i), y: share[written][part],
          customdata: share[written][part].map((value, i) => percent(value, error[written][part][i])), hovertemplate: "%{customdata}", marker: { color, line: { width: 0 } } })) };
    }));
  }

  // one line for each result, with its band
  function byResult(t, given, of, x, colour, label) {
    return given.flatMap((result) => {
      const { share, error } = of(result), at = x(result);
      const name = one ? label : nameOf(result, 40), paint = one ? colour : t.series[results.indexOf(result) % t.series.length];
      return [...(error ? band(name, at, share, error, paint) : []), line(name, at, share, paint, { ...dotted(at), format: error ? ".1%" : ".3f" })];
    });
  }

  function inputPanels(t) {
    const given = having("payers"), { of, axis } = layerAxis(given);
    return [
      { title: "own share", x: axis, y: { title: "share of the own loss", tickformat: ".0%", rangemode: "tozero", ...zeroLine(t) },
        traces: byResult(t, given, (result) => result.payers.hidden, of, t.self, "own share") },
      { title: "cosine of own and later", x: axis, y: { title: "cosine", rangemode: "tozero", ...zeroLine(t) },
        traces: byResult(t, given, (result) => ({ share: result.payers.hidden.cosine }), of, t.mean, "cosine of own and later") },
    ];
  }

  function paidPanels(t) {
    return WRITTEN.flatMap((written) => having("payers").map((result) => {
      const { start, end } = result.position, share = result.payers.position[written], x = middle(start, end);
      const paid = { later: zip(share["self later"], share.future, (a, b) => a + b), own: share.own };
      const traces = Object.entries(paid).map(([payer, values]) => positionLine(`${payer} loss${payer === "own" ? "" : "es"}`, start, end, values, payer === "own" ? t.self : t.other));
      return { title: panelTitle(written, result), traces, ...positionAxes(end) };
    }));
  }

  function modulePanels(t) {
    const given = having("modules_paid"), kinds = [...new Set(given.flatMap((result) => Object.keys(result.modules_paid)))];
    return kinds.map((kind) => {
      const found = given.filter((result) => Object.hasOwn(result.modules_paid, kind)), layers = found.flatMap((result) => result.modules_paid[kind].layer);
      return { title: plain(short(kind, Math.max(12, Math.floor(room / 8)))), x: { title: "layer", ...steps(Math.max(...layers) + 1) }, y: { title: "own share", tickformat: ".0%", rangemode: "tozero", ...zeroLine(t) },
        traces: byResult(t, found, (result) => result.modules_paid[kind], (result) => result.modules_paid[kind].layer, t.self, "own share") };
    });
  }

  function horizonPanels(t) {
    const given = having("horizons"), all = [...new Set(given.flatMap((result) => result.horizons.horizon))].sort((a, b) => a - b);
    const ends = [all[0] / 1.2, all.at(-1) * 1.2], marks = spaced(all, room);
    return STREAMS.map((stream) => ({
      title: stream, x: { type: "log", title: "horizon h (tokens; log scale)", tickvals: marks, ticktext: marks.map(String), range: ends.map(Math.log10) },
      y: { title: "share of the credit that remains", tickformat: ".0%", rangemode: "tozero", ...zeroLine(t) },
      traces: [
        ...given.flatMap((result) => one && result.layers > 1 ? result.horizons.layers[stream].map((share, layer, layers) => layerLine(t, result.horizons.horizon, share, layer, layers.length)) : []),
        line("one half", ends, [0.5, 0.5], t.count, { trace: { hoverinfo: "skip", legendrank: 1003, line: { color: t.count, width: 1.4, dash: "dash" } } }),
        ...byResult(t, given, ({ horizons: { share, error } }) => ({ share: share[stream], error: error[stream] }), (result) => result.horizons.horizon, t.ink, "all layers"),
      ],
    }));
  }
  function layerLine(t, x, share, layer, layers) {
    const label = layer === 0 ? "first layer" : layer === layers - 1 ? "last layer" : null;
    const color = mix(t.depth, layer / Math.max(1, layers - 1));
    return { type: "scatter", mode: x.length < 2 ? "markers" : "lines", x, y: share, connectgaps: false, hoverinfo: "skip", showlegend: label !== null,
      line: { color, width: label ? 1.6 : 1 }, marker: { color, size: 4 }, opacity: label ? 1 : 0.7, ...(label ? { name: label, legendgroup: label, legendrank: 1002 } : {}) };
  }

  // ---- over training: the model with its band, layers as thin lines
  function trainingPanels(t, part, kinds, y) {
    const given = having(part), ends = given.flatMap((result) => [result[part].step[0], result[part].step.at(-1)]);
    return kinds.map((kind) => ({
      title: kind, x: { title: "training step", range: [Math.min(...ends), Math.max(...ends, 1)] },
      y: { ...y, rangemode: "tozero", ...zeroLine(t) },
      traces: [
        ...given.flatMap((result) => one && result.layers > 1 ? result[part].layers[kind].map((share, layer, layers) => layerLine(t, result[part].step, share, layer, layers.length)) : []),
        ...byResult(t, given, (result) => ({ share: result[part].share[kind], error: result[part].error?.[kind] }), (result) => result[part].step, t.ink, "all layers"),
      ],
    }));
  }

  function anglePanels(t) {
    const kinds = Object.keys(Object.assign({}, ...having("training_angle").map((result) => result.training_angle.share)));
    return trainingPanels(t, "training_angle", kinds, { title: "angle (degrees)" })
      .map((panel, number) => ({ ...panel, title: { hidden: "hidden states, at the layers' inputs", parameters: "all parameters" }[kinds[number]] }));
  }

  function reachPanels(t) {
    return STREAMS.flatMap((stream) => having("horizons").map((result) => {
      const { reach, beyond, weak } = ofStream(Object.fromEntries(["reach", "beyond", "weak"].map((name) => [name, result.horizons[name]])), stream);
      const [smallest, largest] = [result.horizons.horizon[0], result.horizons.horizon.at(-1)];
      const text = (l, h) => `layer ${l}, head ${h}<br>effective horizon ` + (beyond[l][h] ? `&gt; ${largest}` : reach[l][h] === null ? "not known" : reach[l][h] <= smallest ? `≤ ${smallest}` : reach[l][h].toPrecision(3));
      const far = beyond.map((row, l) => row.map((value, h) => value && !weak[l][h] ? 1 : null));
      const words = far.map((row, l) => row.map((value, h) => value ? text(l, h) : ""));
      const marked = [{ type: "heatmap", z: far, showscale: false, colorscale: [[0, t.mean], [1, t.mean]], customdata: words, text: far.map((row) => row.map((value) => value ? "&gt;" : "")),
        texttemplate: "%{text}", textfont: { color: t.paper, size: 11 }, hovertemplate: "%{customdata}<extra></extra>", xgap: 1, ygap: 1 }];
      return headsPanel(t, panelTitle(stream, result), result, { z: reach.map((row) => row.map((value) => value === null ? null : Math.log2(value))), weak, text, marked,
        reason: "credit too small or too uncertain" });
    }));
  }
  const horizonEnds = () => having("horizons").flatMap((result) => [result.horizons.horizon[0], result.horizons.horizon.at(-1)]);
  function reachColours(t, wide) {
    const ends = horizonEnds(), cmin = Math.log2(Math.min(...ends)), cmax = Math.max(Math.log2(Math.max(...ends)), cmin + 1);
    const marks = spaced([...new Set(having("horizons").flatMap((result) => result.horizons.horizon))].sort((a, b) => a - b), wide);
    return { colorscale: t.reach, cmin, cmax, colorbar: { tickvals: marks.map(Math.log2), ticktext: marks.map((mark, i) => i ? String(mark) : `h = ${mark}`) } };
  }

  // ---- one figure: panels in a grid whose columns follow the width
  const mapTall = () => Math.min(560, Math.max(200, 15 * Math.max(...results.map((result) => result.layers)) + 20));
  const CHARTS = {
    training: { panels: (t) => trainingPanels(t, "training", STREAMS, { title: "self share", tickformat: ".0%" }), tall: () => 260, part: "training" },
    training_paid: { panels: (t) => trainingPanels(t, "training_paid", WRITTEN, { title: "share of the own loss", tickformat: ".0%" }), tall: () => 260, part: "training_paid", columns: 2 },
    training_angle: { panels: anglePanels, tall: () => 260, part: "training_angle", columns: 2 },
    map: { panels: mapPanels, tall: mapTall, free: true, byResult: true, colours: mapColours },
    lags: { panels: lagPanels, tall: () => 300 },
    layers: { panels: layerPanels, tall: () => 260 },
    positions: { panels: positionPanels, tall: () => 280, byResult: true },
    first: { panels: firstPanels, tall: () => 260 },
    weights: { panels: weights, tall: () => 260, byResult: true, part: "weights" },
    agreement: { panels: agreement, tall: () => 260, byResult: true, part: "weights" },
    payers: { panels: payerPanels, tall: () => 300, byResult: true, part: "payers", columns: 2 },
    inputs: { panels: inputPanels, tall: () => 260, part: "payers", columns: 2, free: true },
    paid: { panels: paidPanels, tall: () => 280, byResult: true, part: "payers", columns: 2 },
    modules: { panels: modulePanels, tall: () => 170, part: "modules_paid" },
    horizons: { panels: horizonPanels, tall: () => 320, part: "horizons" },
    reach: { panels: reachPanels, tall: mapTall, free: true, byResult: true, part: "horizons", colours: reachColours },
  };

  // plotly sets a legend that is too long for one line in equal columns
  function legendLines(names, width) {
    const wide = names.map((name) => 58 + 7 * name.length);
    if (wide.reduce((sum, one) => sum + one, 0) <= width) return Math.min(1, names.length);
    return Math.ceil(names.length / Math.max(1, Math.floor(width / Math.max(...wide))));
  }

  function compose(id, width, t, title) {
    const chart = CHARTS[id];
    const shown = chart.part ? having(chart.part).length : results.length;
    const columns = shown === 1 || !chart.byResult ? (width < 620 ? 1 : chart.columns || 3) : Math.max(1, Math.min(shown, Math.floor(width / 270)));
    room = (width - 80) / columns - 40;
    const panels = chart.panels(t);
    const rows = Math.ceil(panels.length / columns);
    const entries = [...new Set(panels.flatMap((panel) => panel.traces.filter((trace) => trace.showlegend !== false && trace.legendgroup).map((trace) => trace.name)))];
    const margin = { l: 62, r: 12, t: title ? 96 : 56, b: 58 + 28 * legendLines(entries, width) + (chart.colours ? 34 : 0) };
    const gapX = chart.free ? 62 : 34, gapY = 88, tall = chart.tall();
    const inner = { width: width - margin.l - margin.r, height: rows * tall + (rows - 1) * gapY };
    const wide = (inner.width - (columns - 1) * gapX) / columns;
    const font = { family: "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'DejaVu Sans', Arial, sans-serif", size: 12.5, color: t.soft };
    const layout = { width, height: inner.height + margin.t + margin.b, margin, font, paper_bgcolor: t.paper, plot_bgcolor: t.paper,
      hovermode: chart.colours ? "closest" : "x unified", barmode: "relative", bargap: 0.12, dragmode: "zoom", annotations: [],
      hoverlabel: { bgcolor: t.paper, bordercolor: t.axis, font: { color: t.ink, size: 12.5 } },
      legend: { orientation: "h", x: 0, xref: "container", y: 0, yref: "container", yanchor: "bottom", xanchor: "left", font: { size: 12.5, color: t.ink }, bgcolor: "rgba(0,0,0,0)" },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: t.soft, activecolor: t.ink, orientation: "h" } };
    if (title) layout.title = { text: plain(title), x: 0, xref: "paper", xanchor: "left", y: 1, yref: "container", yanchor: "top", pad: { t: 16 }, font: { size: 16, color: t.ink } };
    if (chart.colours) {
      const len = Math.min(460, inner.width), { colorbar, ...colours } = chart.colours(t, len);
      layout.coloraxis = { ...colours, colorbar: { orientation: "h", x: 0, xanchor: "left", y: 0, yref: "container", yanchor: "bottom", len, lenmode: "pixels", thickness: 11, outlinewidth: 0,
        tickfont: { color: t.soft }, ...colorbar } };
    }
    const seen = new Set(), data = [];
    panels.forEach((panel, number) => {
      const column = number % columns, row = Math.floor(number / columns), name = number ? String(number + 1) : "";
      const left = column * (wide + gapX) / inner.width, top = 1 - row * (tall + gapY) / inner.height;
      const axis = { gridcolor: t.grid, linecolor: t.axis, zeroline: false, tickcolor: t.axis, ticks: "outside", ticklen: 4, showline: true, tickfont: { color: t.soft, size: 11.5 }, automargin: false };
      const label = (text) => ({ text, font: { size: 12, color: t.soft }, standoff: 6 });
      layout["xaxis" + name] = { ...axis, ...panel.x, title: label(panel.x.title), anchor: "y" + name, domain: [left, left + wide / inner.width] };
      layout["yaxis" + name] = { ...axis, ...panel.y, title: label(chart.free || column === 0 ? panel.y.title : ""), anchor: "x" + name,
        domain: [top - tall / inner.height, top], ...(!chart.free && number ? { matches: "y" } : {}), showticklabels: chart.free || column === 0 };
      layout.annotations.push({ text: `<b>${panel.title}</b>`, showarrow: false, xref: "paper", yref: "paper", x: left, y: top, xanchor: "left", yanchor: "bottom", yshift: 7, font: { size: 13.5, color: t.ink } });
      for (const trace of panel.traces) {
        const key = trace.legendgroup, hidden = trace.showlegend === false || seen.has(key);
        if (!hidden && key) seen.add(key);
        data.push({ ...trace, showlegend: Boolean(key) && !hidden, xaxis: "x" + name, yaxis: "y" + name });
      }
    });
    return { data, layout };
  }

  // ---- drawing, saving, and drawing again when the width, the colours or the view change
  const title = (id) => document.getElementById(id + "-title").textContent;
  function save(id, format) {
    const figure = compose(id, 1100, THEMES.light, title(id));
    const { width, height } = figure.layout;
    return Plotly.downloadImage(figure, { format, width, height, scale: format === "png" ? 2 : 1, filename: "posterity-" + id });
  }
  const letters = (path) => ({ width: 24, height: 24, path });
  const button = (id, format, icon) => ({ name: "save-" + format, title: "Save as " + format.toUpperCase(), icon, click: () => save(id, format) });
  const ICONS = {
    svg: letters("M5 3h9l5 5v13H5V3zm8 2v4h4M8 17l3-5 2.5 3.5 1.5-2 2 3.5H8z"),
    png: letters("M9 4l-1.5 2H4v13h16V6h-3.5L15 4H9zm3 4.5a4 4 0 110 8 4 4 0 010-8zm0 2a2 2 0 100 4 2 2 0 000-4z"),
  };

  async function draw(id) {
    const place = document.querySelector(`[data-chart="${id}"]`);
    const width = Math.floor(printing ? 680 : place.clientWidth);
    if (!width) return;
    const { data, layout } = compose(id, width, theme());
    const config = { displaylogo: false, displayModeBar: true, responsive: false,
      modeBarButtons: [["zoom2d", "pan2d", "resetScale2d"], [button(id, "svg", ICONS.svg), button(id, "png", ICONS.png)]] };
    await Plotly.react(place, data, layout, config);
    place.dataset.drawn = width;
  }
  const ids = Object.keys(CHARTS).filter((id) => document.querySelector(`[data-chart="${id}"]`));
  const drawAll = () => Promise.all(ids.map(draw));

  let waiting;
  const watch = new ResizeObserver((entries) => {
    if (printing || entries.every(({ target }) => Number(target.dataset.drawn) === Math.floor(target.clientWidth))) return;
    clearTimeout(waiting);
    waiting = setTimeout(drawAll, 120);
  });
  dark.addEventListener("change", drawAll);
  addEventListener("beforeprint", () => { printing = true; drawAll(); });
  addEventListener("afterprint", () => { printing = false; drawAll(); });
  for (const input of document.querySelectorAll('input[name="view"]')) input.addEventListener("change", () => {
    view = input.value;
    for (const words of document.querySelectorAll("span[data-view]")) words.hidden = words.dataset.view !== view;
    draw("lags");
  });
  drawAll().then(() => {
    document.documentElement.dataset.drawn = ids.length;
    for (const id of ids) watch.observe(document.querySelector(`[data-chart="${id}"]`));
  });
})();
