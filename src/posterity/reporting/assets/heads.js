"use strict";
// One head at a time, that of a cell of the map or of the fields under it: its numbers, and its shares up to each lag.
page.onReady(() => {
  const { heads: members, streams } = page.data;
  const form = document.getElementById("head-choice");
  const table = document.getElementById("head-numbers");
  const range = document.getElementById("head-range");
  const { layer: layerField, head: headField, member: memberField } = form.elements;

  // ---- packed numbers: little-endian, in base64
  const KINDS = { f4: [4, "getFloat32", 1], i2: [2, "getInt16", 1e-4], u1: [1, "getUint8", 1] };
  const UNKNOWN_I2 = -(2 ** 15);
  const arrays = new Map();
  function unpacked({ kind, data }) {
    if (!arrays.has(data)) {
      const bytes = Uint8Array.from(atob(data), (sign) => sign.charCodeAt(0));
      const [size, read, unit] = KINDS[kind];
      const view = new DataView(bytes.buffer);
      const number = (_, index) => {
        const value = view[read](index * size, true);
        return kind === "i2" && value === UNKNOWN_I2 ? NaN : unit * value;
      };
      arrays.set(data, Float64Array.from({ length: bytes.length / size }, number));
    }
    return arrays.get(data);
  }
  // The numbers of a head: of an array (layer, head, number).
  function numbersOf(packed, { heads }, layer, head) {
    const length = packed.numbers;
    const start = (layer * heads + head) * length;
    return unpacked(packed).slice(start, start + length);
  }

  // ---- words
  const signed = (text) => text.replace("-", "\u2212");
  const decimals = (value, digits) => (Number(value.toFixed(digits)) + 0).toFixed(digits); // no minus before a zero
  function percent(share, error) {
    if (Number.isNaN(share)) return "–";
    const digits = (Math.abs(share) > 0 && Math.abs(share) < 0.01) || (error > 0 && error < 0.0005) ? 2 : 1;
    const more = Number.isNaN(error ?? NaN) ? "" : ` ±\u00a0${(100 * error).toFixed(digits)}`;
    return signed(`${decimals(100 * share, digits)}${more}\u00a0%`);
  }
  function tokens(length, [smallest, largest]) {
    if (Number.isNaN(length)) return "–";
    if (!Number.isFinite(length)) return `> ${largest} tokens`;
    if (length <= smallest) return `≤ ${smallest} token${smallest === 1 ? "" : "s"}`;
    return `${length < 10 ? length.toFixed(1) : Math.round(length)} tokens`;
  }

  // A row of numbers as text, by stream; "–" where the row has no such stream.
  function texts(row, member, layer, head, reader) {
    const numbers = numbersOf(row.values[reader] ?? row.values.all, member, layer, head);
    return streams.map((_, stream) => {
      const index = row.streams.indexOf(stream);
      if (index < 0) return "–";
      if (row.ends) return tokens(numbers[index], row.ends);
      if (row.decimals) return Number.isNaN(numbers[index]) ? "–" : signed(decimals(numbers[index], row.decimals));
      return percent(numbers[index], numbers[index + row.streams.length]);
    });
  }

  // ---- the labels of the maps, in every view of them
  const WEAK = "<br>credit too small or too uncertain";
  const escaped = (text) => text.replace("<", "&lt;").replace(">", "&gt;").replace("–", "not known");
  function labels(name, { member: number, stream }, reader) {
    const member = members[number];
    const rows = member.rows.filter(({ figure }) => figure === name);
    const label = (layer, head) => {
      const numbers = rows.map((row) => texts(row, member, layer, head, reader)[stream]);
      const weak = numbersOf(member.weak[reader] ?? member.weak.all, member, layer, head)[stream];
      const note = weak || numbers.includes("–") ? WEAK : "";
      return [...numbers.map(escaped), member.marks[layer][head] ? "<br>no such head" : note];
    };
    const all = (length) => [...Array(length).keys()];
    return all(member.layers).map((layer) => all(member.heads).map((head) => label(layer, head)));
  }
  for (const name of ["map", "head_horizons"]) {
    const { data: traces, views = {} } = page.data.figures[name] ?? { data: [] };
    traces.forEach((trace, index) => {
      if (!trace.coloraxis) return;
      trace.customdata = labels(name, trace.meta, members[trace.meta.member].weak.rest ? "rest" : "all");
      for (const [reader, { data: changes }] of Object.entries(views)) {
        changes[index] = { ...changes[index], customdata: labels(name, trace.meta, reader) };
      }
    });
  }

  // ---- one head
  const readers = () => page.choice("readers") ?? "all";

  function show() {
    const member = members[memberField?.value ?? 0];
    layerField.max = member.layers - 1;
    headField.max = member.heads - 1;
    const beyond = [layerField, headField].some((field) => field.value && !field.validity.valid);
    const ends = `layers 0 to ${layerField.max}, heads 0 to ${headField.max}`;
    range.textContent = beyond ? `no such head: there are ${ends}; below is still the one before` : ends;
    range.classList.toggle("warning", beyond);
    if (!form.checkValidity()) return;
    const [layer, head] = [Number(layerField.value), Number(headField.value)];
    showNumbers(member, layer, head);
    if (page.data.figures.head) showCurves(member, layer, head);
  }

  function showCurves(member, layer, head) {
    const curves = member.curves[readers()] ?? member.curves.all;
    const shares = numbersOf(curves, member, layer, head);
    const traces = page.data.figures.head.data.map((trace, number) => {
      const length = member.lags.length;
      const own = [...shares.slice(number * length, (number + 1) * length)];
      const y = own.map((share) => (Number.isNaN(share) ? null : 100 * share));
      const labels = own.map((share, index) => [member.lags[index], percent(share)]);
      return number < curves.numbers / length ? { ...trace, x: member.x, y, customdata: labels } : trace;
    });
    page.redraw("head", traces);
  }

  function showNumbers(member, layer, head) {
    const cell = (tag, text, scope) => {
      const node = document.createElement(tag);
      node.textContent = text;
      if (scope) node.scope = scope;
      return node;
    };
    const caption = document.createElement("caption");
    const title = member.title ? ` of ${member.title}` : "";
    caption.textContent = `Layer ${layer}, head ${head}${title}${member.marks[layer][head]}`;
    const top = document.createElement("tr");
    const weak = numbersOf(member.weak[readers()] ?? member.weak.all, member, layer, head);
    const names = streams.map((stream, index) => (weak[index] ? `${stream} †` : stream));
    top.append(cell("td", ""), ...names.map((name) => cell("th", name, "col")));
    document.getElementById("head-weak").hidden = !weak.includes(1);
    const rows = member.rows.map((row) => {
      const line = document.createElement("tr");
      const numbers = texts(row, member, layer, head, readers());
      line.append(cell("th", row.label, "row"), ...numbers.map((text) => cell("td", text)));
      return line;
    });
    table.replaceChildren(caption, top, ...rows);
  }

  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  page.onChoice(show);
  page.onDrawn(() => {
    page.place("map").on("plotly_click", ({ points: [{ x, y, data }] }) => {
      const panel = Number(data.xaxis.slice(1) || 1) - 1;
      if (memberField) memberField.value = panel % members.length;
      [layerField.value, headField.value] = [y, x];
      show();
    });
  });
  [layerField.value, headField.value] = members[0].begin;
  show();
});
