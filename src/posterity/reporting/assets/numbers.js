"use strict";
// Under every figure: buttons that save it, and its numbers as a table that can be copied.
page.onReady(() => {
  const DIGITS = 4; // of a number without a label of its own

  function element(name, text, attributes = {}) {
    const node = document.createElement(name);
    node.textContent = text;
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    return node;
  }

  function button(text, label, click) {
    const node = element("button", text, { type: "button", "aria-label": label });
    node.addEventListener("click", () => click(node));
    return node;
  }

  // ---- copying
  async function copy(text) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch { // in a notebook's frame there is no clipboard but this
      const area = element("textarea", text);
      document.body.append(area);
      area.select();
      const done = document.execCommand("copy");
      area.remove();
      return done;
    }
  }

  // Tables as text: cells between tabs, signs that a program reads.
  function plainText(tables) {
    const cells = (row) => [...row.cells].map((cell) => cell.textContent.trim()).join("\t");
    const lines = tables.flatMap((table) => [table.caption?.textContent ?? "", ...[...table.rows].map(cells), ""]);
    return lines.join("\n").replaceAll("\u2212", "-").replaceAll("\u00a0", " ").trim() + "\n";
  }

  async function copyTables(node) {
    const tables = [...node.closest("details").querySelectorAll("table")].filter((table) => !table.closest("[hidden]"));
    const done = await copy(plainText(tables));
    node.textContent = done ? "Copied" : "Not copied: select the table";
    setTimeout(() => (node.textContent = "Copy"), 2000);
  }

  // ---- the numbers of a figure
  // Plotly reads a little HTML in texts; here they are texts again.
  const SIGNS = Object.entries({ "&lt;": "<", "&gt;": ">", "&amp;": "&" });
  const unescaped = (text) => SIGNS.reduce((rest, [code, sign]) => rest.replaceAll(code, sign), text);
  const plain = (text) => unescaped(String(text).replace(/<\/?\w+>/g, " ")).trim();

  function formatted(value, percent) {
    if (typeof value !== "number") return value === null || value === undefined ? "–" : plain(value);
    const text = percent ? `${Number(value.toPrecision(3))} %` : String(Number(value.toPrecision(DIGITS)));
    return text.replace("-", "\u2212");
  }

  const isMap = (trace) => trace.type === "heatmap";
  const isDrawn = (trace) => trace.hoverinfo !== "skip" && trace.visible !== false && trace.x?.length;
  const isShown = (trace) => (isMap(trace) ? trace.coloraxis : isDrawn(trace));

  const labels = (trace) => trace.x.map((x, index) => {
    const label = trace.customdata?.[index];
    return Array.isArray(label) ? plain(label[0]) : formatted(x);
  });
  function cell(trace, index, percent) {
    const label = trace.customdata?.[index];
    const text = Array.isArray(label) ? label[1] : label;
    const error = trace.error_y?.array?.[index];
    const value = formatted(trace.y[index], percent);
    if (typeof text === "string") return plain(text);
    return typeof error === "number" ? `${value} ± ${formatted(error, percent)}` : value;
  }

  function mapRows(trace) {
    const heads = trace.x ?? trace.z[0].map((_, head) => head);
    const rows = trace.z.map((values, layer) => [
      trace.y?.[layer] ?? layer,
      ...values.map((value, head) => {
        const labels = trace.customdata?.[layer]?.[head] ?? [];
        const label = labels[0] ?? trace.text?.[layer]?.[head];
        const mark = /too small/.test(labels.at(-1)) ? " †" : "";
        return typeof label === "string" && label ? plain(label) + mark : formatted(value);
      }),
    ]);
    return [["layer", ...heads.map((head) => `head ${head}`)], ...rows];
  }

  function lineTables(traces, x, percent) {
    const columns = traces.map((trace) => ({ trace, name: plain(trace.name ?? ""), labels: labels(trace) }));
    const unique = columns.every(({ labels: own }) => new Set(own).size === own.length);
    if (!unique) {
      return columns.map(({ trace, name, labels: own }) => [
        [x, name || "value"],
        ...own.map((label, index) => [label, cell(trace, index, percent)]),
      ]);
    }
    const longest = columns.reduce((best, column) => (column.labels.length > best.labels.length ? column : best));
    const rows = [...new Set([...longest.labels, ...columns.flatMap((column) => column.labels)])];
    const cellAt = ({ trace, labels: own }, label) =>
      own.includes(label) ? cell(trace, own.indexOf(label), percent) : "";
    const head = [x, ...columns.map(({ name }) => name || "value")];
    return [[head, ...rows.map((label) => [label, ...columns.map((column) => cellAt(column, label))])]];
  }

  function tablesOf(name) {
    const { data: traces, layout } = page.chosen(name);
    const panels = new Map();
    for (const trace of traces.filter(isShown)) {
      const axis = trace.xaxis ?? "x";
      panels.set(axis, [...(panels.get(axis) ?? []), trace]);
    }
    return [...panels].flatMap(([axis, shown]) => {
      const title = layout.annotations?.find(({ xref }) => xref === `${axis} domain`)?.text ?? "";
      const suffix = axis.slice(1);
      const x = plain(layout[`xaxis${suffix}`]?.title?.text ?? "").replace(RegExp("; log scale[^)]*"), "");
      const percent = layout[`yaxis${suffix}`]?.ticksuffix === " %";
      const tables = isMap(shown.at(-1)) ? shown.map(mapRows) : lineTables(shown, x, percent);
      const marked = tables.flat(2).some((text) => String(text).endsWith(" †"));
      const caption = plain(title) + (marked ? " († credit too small or too uncertain)" : "");
      return tables.map((rows) => ({ caption, rows }));
    });
  }

  function tableNode({ caption, rows: [head, ...rows] }) {
    const table = element("table", "");
    if (caption) table.append(element("caption", caption));
    const top = table.createTHead().insertRow();
    for (const name of head) top.append(element("th", name, { scope: "col" }));
    const body = table.createTBody();
    for (const [label, ...cells] of rows) {
      const row = body.insertRow();
      row.append(element("th", label, { scope: "row" }));
      for (const text of cells) row.append(element("td", text));
    }
    const label = caption || "Numbers";
    const frame = element("div", "", { class: "wide", tabindex: "0", role: "region", "aria-label": label });
    frame.append(table);
    return frame;
  }

  for (const name of page.names) {
    const chart = page.place(name);
    const figure = chart.closest("figure");
    const title = figure.querySelector("h3, h4").textContent;
    const tools = element("div", "", { class: "tools" });
    for (const format of ["svg", "png"]) {
      const kind = format.toUpperCase();
      tools.append(button(kind, `Save as ${kind}: ${title}`, () => page.save(name, format)));
    }
    chart.before(tools);

    let numbers = figure.querySelector("details.numbers");
    if (!numbers) {
      numbers = element("details", "", { class: "numbers" });
      numbers.append(element("summary", "The numbers of this chart"), element("div", "", { class: "results" }));
      figure.append(numbers);
      const fill = () => {
        if (numbers.open) numbers.querySelector(".results").replaceChildren(...tablesOf(name).map(tableNode));
      };
      numbers.addEventListener("toggle", fill);
      page.onChoice(fill);
      page.onRedraw(fill);
    }
    numbers.querySelector("summary").after(button("Copy", `Copy the numbers: ${title}`, copyTables));
  }
});
