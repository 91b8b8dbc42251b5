// An answer whose tokens are coloured by how much likelier the chosen alpha makes them than alpha 0.

const FULL = 4; // nats at which the colour is at its strongest
const STRONG = 1; // nats from which a token is underlined too: colour is never alone

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") made.className = value; else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

const shown = (text) => (text.trim() ? text.trim() : JSON.stringify(text));
const percent = (logprob) => {
  const p = 100 * Math.exp(logprob);
  return p >= 10 ? `${p.toFixed(0)} %` : p >= 0.01 ? `${Number(p.toPrecision(2))} %` : "under 0.01 %";
};

export function sentence(token) {
  return `“${shown(token.text)}”: ${percent(token.low)} at alpha 0, ${percent(token.high)} at alpha ${token.alpha}`;
}

// Fills `place` with the tokens. `tell` hears the token under the pointer or the arrow keys, or null.
export function showTokens(place, tokens, tell) {
  place.replaceChildren();
  const spans = tokens.map((token) => {
    const difference = token.high - token.low;
    const much = Math.min(1, Math.abs(difference) / FULL);
    // The space before a word is no part of what is coloured: it would dangle where a line ends.
    const word = token.text.trimStart();
    const span = element("span", { class: "token" }, word || token.text);
    span.classList.add(difference < 0 ? "cool" : "warm");
    span.classList.toggle("strong", Math.abs(difference) >= STRONG);
    span.style.setProperty("--hue", difference < 0 ? "var(--cool)" : "var(--warm)");
    span.style.setProperty("--much", (0.62 * much).toFixed(3));
    span.title = sentence(token);
    span.addEventListener("pointerenter", () => tell(token));
    if (word) place.append(token.text.slice(0, token.text.length - word.length));
    place.append(span);
    return span;
  });
  let at = -1;
  const go = (next) => {
    spans[at]?.classList.remove("at");
    at = Math.max(0, Math.min(spans.length - 1, next));
    spans[at]?.classList.add("at");
    tell(tokens[at] ?? null);
  };
  place.onkeydown = (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || !spans.length) return;
    event.preventDefault();
    go(at + step);
  };
  place.onblur = () => { spans[at]?.classList.remove("at"); at = -1; };
  place.onpointerleave = () => tell(null);
}

export function table(place, heads, rows) {
  const cell = (name, value) => element(name, typeof value === "number" ? { class: "n" } : {}, String(value));
  const head = element("tr", {}, ...heads.map((h, i) => element("th", typeof rows[0]?.[i] === "number" ? { class: "n", scope: "col" } : { scope: "col" }, h)));
  place.replaceChildren(element("thead", {}, head), element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map((v) => cell("td", v))))));
}
