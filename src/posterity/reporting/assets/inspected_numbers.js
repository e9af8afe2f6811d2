"use strict";
// The numbers of one inspected text: its packed matrices, the shares of the losses, and what stands against a token.
// A matrix is of size x size; a row is a loss, a column a key.
const inspectedNumbers = (() => {
  const WRITTEN = { both: ["key", "value"], key: ["key"], value: ["value"] };
  const CANCELLED = 1e-3; // where the parts cancel to less of their sizes than this, no share is known

  // Packed as inspected_text.py says: a scale for each key, then the lower triangle row by row.
  function unpack(packed, size) {
    const binary = atob(packed);
    const bytes = new Uint8Array(binary.length);
    for (let i = 0; i < bytes.length; i++) bytes[i] = binary.charCodeAt(i);
    return { scale: new Float32Array(bytes.buffer, 0, size), shorts: new Int16Array(bytes.buffer, 4 * size) };
  }

  function layerMatrix(text, measure, stream, layer) {
    const layers = text[measure][stream];
    if (typeof layers[layer] === "string") layers[layer] = unpack(layers[layer], text.tokens.length - 1);
    return layers[layer];
  }

  // Credit adds up over layers, keys and values; of norms the root of the summed squares is taken.
  function matrix(text, { measure, written, layer }) {
    const size = text.tokens.length - 1;
    const sum = new Float64Array(size * size);
    for (const stream of WRITTEN[written]) {
      for (const index of layer === "all" ? text[measure][stream].keys() : [layer]) {
        const { scale, shorts } = layerMatrix(text, measure, stream, index);
        let i = 0;
        for (let loss = 0; loss < size; loss++) {
          for (let key = 0; key <= loss; key++) {
            const value = shorts[i++] * scale[key];
            sum[loss * size + key] += measure === "norm" ? value * value : value;
          }
        }
      }
    }
    return measure === "norm" ? sum.map(Math.sqrt) : sum;
  }

  // Each column over its sum: what each loss has in the gradient of a key or value. NaN where that is about nothing.
  function shares(values, size) {
    const quotients = new Float64Array(size * size).fill(NaN);
    for (let key = 0; key < size; key++) {
      let sum = 0;
      let sizes = 0;
      for (let loss = key; loss < size; loss++) {
        sum += values[loss * size + key];
        sizes += Math.abs(values[loss * size + key]);
      }
      if (sum <= CANCELLED * sizes || Number.isNaN(sum)) continue;
      for (let loss = key; loss < size; loss++) quotients[loss * size + key] = values[loss * size + key] / sum;
    }
    return quotients;
  }

  const exists = (view, loss, key) => loss < view.size && key <= loss;

  // The share of a loss in the gradient of a key or value; null where it is not known.
  function share(view, loss, key) {
    const quotient = view.shares[loss * view.size + key];
    return Number.isFinite(quotient) ? quotient : null;
  }

  // Loss and key of another token and the chosen one.
  const pairWith = (view, other) => (view.choice.toward === "losses" ? [other, view.token] : [view.token, other]);

  // All that stands against the chosen token, by rising lag: later losses, or earlier keys and values.
  function partners(view) {
    const rows = [];
    const step = view.choice.toward === "losses" ? 1 : -1;
    for (let token = view.token; token >= 0 && exists(view, ...pairWith(view, token)); token += step) {
      const [loss, key] = pairWith(view, token);
      const value = view.values[loss * view.size + key];
      rows.push({ token, lag: loss - key, share: share(view, loss, key), value });
    }
    return rows;
  }

  const largest = (rows) => rows.filter((row) => row.share !== null).sort((a, b) => b.share - a.share);
  const total = (numbers) => numbers.reduce((sum, number) => sum + number, 0);

  // To begin with: the token with the loss that is farthest off for its share.
  function mostDistant(view) {
    let best = 0;
    let most = 0;
    for (let loss = 0; loss < view.size; loss++) {
      for (let key = 0; key < loss; key++) {
        const distance = (share(view, loss, key) ?? 0) * (loss - key);
        if (distance > most) {
          most = distance;
          best = key;
        }
      }
    }
    return best;
  }

  return { WRITTEN, layerMatrix, matrix, shares, exists, share, pairWith, partners, largest, total, mostDistant };
})();
