"use strict";
// What an inspected text is drawn with: its colours, which follow the reader's scheme, and elements of the page.
const inspectedElements = (() => {
  const template = document.getElementById("inspected-template").content;
  const FULL = 0.5; // the share with the full colour; the strength goes by the root, so that 2 % can be seen

  // ---- colours: orange is the own loss, blue the others, purple what points against the sum
  const parts = (colour) => [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));
  let shades; // 256 from the paper to each hue

  function mixShades() {
    const { paper, ...hues } = page.data.inspected_texts[0].colours;
    const from = parts(page.colour(paper));
    const mix = (to, step) => from.map((value, i) => Math.round(value + (step / 255) * (to[i] - value)));
    shades = Object.fromEntries(
      Object.entries(hues).map(([name, hue]) => {
        const to = parts(page.colour(hue));
        return [name, Array.from({ length: 256 }, (_, step) => mix(to, step))];
      }),
    );
  }

  function colour(share, own) {
    const step = Math.round(255 * Math.sqrt(Math.min(1, Math.abs(share) / FULL))) || 0;
    return shades[share < 0 ? "against" : own ? "own" : "other"][step];
  }

  function luminance(rgb) {
    const linear = (value) => (value <= 10 ? value / 3294 : ((value / 255 + 0.055) / 1.055) ** 2.4);
    const [red, green, blue] = rgb.map(linear);
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  }

  // Black or white, whichever can be read; the page's own ink where nothing is painted.
  function paint(element, share, own) {
    const rgb = share ? colour(share, own) : null;
    element.style.backgroundColor = rgb ? `rgb(${rgb})` : "";
    element.style.color = rgb ? (luminance(rgb) > 0.179 ? "#000" : "#fff") : "";
  }

  // ---- elements
  function element(tag, text = "", attributes = {}) {
    const node = document.createElement(tag);
    node.textContent = text;
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    return node;
  }

  function svgElement(tag, attributes, text) {
    const node = document.createElementNS(template.querySelector("svg").namespaceURI, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text) node.textContent = text;
    return node;
  }

  // A text that is the same is not read out twice.
  function say(element, text) {
    if (element.textContent !== text) element.textContent = text;
  }

  // The smallest of a few round numbers that leaves the marks of an axis apart.
  const roundStep = (steps, fits) => steps.find(fits) ?? steps.at(-1);

  return { FULL, template, mixShades, colour, paint, element, svgElement, say, roundStep };
})();
