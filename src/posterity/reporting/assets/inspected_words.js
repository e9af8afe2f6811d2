"use strict";
// One inspected text in words: what is said of a token, of a pair of tokens, and of the numbers shown.
const inspectedWords = (() => {
  const { largest, share, total } = inspectedNumbers;
  const WRITTEN = { both: "key and value", key: "key", value: "value" };

  function percent(share, digits = 1) {
    if (share === null) return "not known";
    const number = (100 * share).toFixed(digits).replace(/^-(?=0\.?0*$)/, "");
    return `${number.replace("-", "−")} %`;
  }
  function brief(share) {
    if (Math.abs(share) < 0.0005) return "";
    return percent(share, Math.abs(share) < 0.0995 ? 1 : 0);
  }
  const number = (value) => value.toPrecision(3).replaceAll("-", "−");

  // At most 24 letters, also where one letter has many marks.
  function short(text) {
    const letters = [...text.replace(/(\p{M}{3})\p{M}+/gu, "$1")];
    return letters.length > 24 ? `${letters.slice(0, 23).join("")}…` : letters.join("");
  }
  const quoted = (text) => `“\u2068${short(text)}\u2069”`; // isolated: right-to-left letters turn nothing else around
  const part = (share, digits) => (share === null ? "an unknown share" : percent(share, digits));
  const name = (view, token) => `token ${token} ${quoted(view.text.tokens[token])}`;
  const capitalName = (view, token) => name(view, token).replace("t", "T");
  const next = (view, loss) => quoted(view.text.tokens[loss + 1]);

  // What is said of the chosen token, given its rows.
  function sentence(view, rows) {
    const own = rows.length ? rows[0].share : null;
    const [top] = largest(rows.slice(1));
    const say = view.choice.toward === "losses" ? sentenceOnKey : sentenceOnLoss;
    return `${capitalName(view, view.token)}${say(view, rows, own, top)}`;
  }

  function sentenceOnKey(view, rows, own, top) {
    if (view.token === view.size) return ` is the last: no loss depends on its ${WRITTEN[view.choice.written]}.`;
    if (own === null) return ": no share is known, the parts of its gradient add up to about nothing.";
    const later = percent(top ? total(rows.slice(1).map((row) => row.share)) : 0);
    const most = top
      ? `, most by ${name(view, top.token)} (${percent(top.share)}), in predicting ${next(view, top.token)}`
      : "";
    return `: own loss ${percent(own)}, later losses ${later}${most}.`;
  }

  function sentenceOnLoss(view, rows, own, top) {
    if (view.token === view.size) return " is the last: it has no loss, the text does not say what comes next.";
    const earlier = top ? `; of earlier ones most of ${name(view, top.token)} (${percent(top.share)}).` : ".";
    const all = percent(total(rows.map((row) => row.value)) / total(view.values));
    const brings = view.choice.measure === "credit" ? ` It brings ${all} of all credit in the text.` : "";
    const what = `${part(own)} of its own ${WRITTEN[view.choice.written]}`;
    return `: its loss, in predicting ${next(view, view.token)}, pays ${what}${earlier}${brings}`;
  }

  // What is said of a loss and a key.
  function pair(view, loss, key) {
    if (loss === view.size) return `${capitalName(view, loss)} is the last and has no loss.`;
    if (key > loss) return `The loss at ${name(view, loss)} cannot depend on the later ${name(view, key)}.`;
    const { measure, written } = view.choice;
    const value = `${measure} ${number(view.values[loss * view.size + key])} ${unit(measure)}`;
    const owner = loss === key ? "the same token" : name(view, key);
    const paid = `${part(share(view, loss, key), 2)} of the ${WRITTEN[written]} of ${owner}`;
    return `The loss at ${name(view, loss)}, in predicting ${next(view, loss)}, pays ${paid}: ${value}.`;
  }
  const unit = (measure) => (measure === "credit" ? "nats²" : "nats");

  // How far away the readers of the chosen token are.
  function readers(view) {
    const lags = view.text.reader_lags;
    if (!lags) return "";
    const [attention, key, value] = view.choice.layer === "all" ? lags.all : lags.layers[view.choice.layer];
    const within = (levels) => {
      const numbers = levels.map((positions) => positions[view.token]);
      return numbers.includes(null) ? "not known" : numbers.join(" and ");
    };
    const parts = lags.levels.map((level) => percent(level, 0)).join(" and ");
    return (
      `Its readers: ${parts} of its key credit within lag ${within(key)}, of its value credit within ` +
      `${within(value)}, of the attention on it within ${within(attention)}.`
    );
  }

  // What is said while no pair is pointed at.
  function hint(view) {
    if (view.held !== null) {
      const held = capitalName(view, view.held);
      return `${held} is held: point at another for the number between the two. Escape lets it go.`;
    }
    return (
      "Point at a token, or go with the arrow keys. Click or Enter holds a token; " +
      "then point at another for the number between the two."
    );
  }

  // What the numbers are.
  function note({ measure, layer, written }) {
    const streams = written === "both" ? "keys and values" : `${written}s`;
    const subject = `the ${streams} of ${layer === "all" ? "all layers" : `layer ${layer}`}`;
    const several = layer === "all" || written === "both";
    if (measure === "credit") {
      return `Credit for ${subject}${several ? ", added up: where the gradient is larger it weighs more" : ""}.`;
    }
    const sums = "; norms do not add up, it is the root of their summed squares";
    return (
      `Norm of each loss's part in the gradient of ${subject}, whatever its direction${several ? sums : ""}. ` +
      "A share is over the sum of the norms of all losses."
    );
  }

  return { percent, brief, number, short, sentence, pair, readers, hint, note, unit };
})();
