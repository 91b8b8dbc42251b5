// Wires the page: ask at two alphas, colour the answers, show the sweep and the report.

import { get, post, stream, useKey, useKeyOfAddress } from "./api.js";
import { drawLayers, drawSweep } from "./charts.js";
import { ALPHAS, MOST, fromSummary, measure, readExamples } from "./sweep.js";
import { element, sentence, showTokens, table } from "./tokens.js";

const $ = (id) => document.getElementById(id);
let state = null; // what the server says of itself
let sweep = null; // what the chart shows
let running = null; // AbortController of the answers being made

const alpha = () => Number($("alpha").value);

function trouble(message) {
  $("trouble").hidden = !message;
  $("trouble").textContent = message ?? "";
}

function showAlpha() {
  $("alpha-value").textContent = alpha().toFixed(2);
  $("alpha-value").classList.toggle("zero", alpha() === 0);
  if (!running) $("tag-1").textContent = `alpha ${alpha()}`;
  if (sweep) drawSweep($("sweep"), sweep, alpha());
}

function request() {
  const text = $("prompt").value;
  const form = $("form").value;
  const common = { model: state.model, temperature: 0, max_tokens: Number($("tokens").value) };
  if (form === "chat") return { path: "/v1/chat/completions", common, given: { messages: [{ role: "user", content: text }] } };
  return { path: "/v1/completions", common, given: { prompt: form === "plain" ? state.plain.replace("{}", () => text) : text } };
}

async function answer(side, at, asked, signal) {
  const place = $(`answer-${side}`);
  place.replaceChildren();
  place.classList.remove("empty");
  place.classList.add("busy");
  $(`note-${side}`).textContent = "";
  let text = "";
  try {
    const finish = await stream(asked.path, { ...asked.common, ...asked.given, alpha: at }, signal, (piece) => {
      text += piece;
      place.textContent = text.trimStart();
    });
    $(`note-${side}`).textContent = finish === "length" ? "cut at the token limit" : "";
  } finally {
    place.classList.remove("busy");
    if (!text) { place.classList.add("empty"); place.dataset.empty = "(nothing)"; }
  }
  return text;
}

async function colour(side, text, high, asked, signal) {
  if (!text) return [];
  const body = { model: state.model, ...asked.given, completion: text, alphas: [0, high] };
  const score = await post("/v1/score", body, signal);
  const [low, up] = score.data.map((row) => row.logprobs);
  const tokens = score.tokens.map((token, i) => ({ text: i ? token : token.trimStart(), low: low[i], high: up[i], alpha: high }));
  const tell = (token) => { $("reading").textContent = token ? sentence(token) : ""; };
  // A token that ends within a character has no text of its own.
  showTokens($(`answer-${side}`), tokens.filter((token) => token.text), tell);
  const mean = (values) => Math.exp(values.reduce((a, b) => a + b, 0) / values.length);
  const cut = $(`note-${side}`).textContent;
  $(`note-${side}`).textContent = `probability per token ${mean(low).toFixed(2)} at alpha 0, ${mean(up).toFixed(2)} at alpha ${high}${cut ? ` · ${cut}` : ""}`;
  return tokens;
}

async function ask(event) {
  event.preventDefault();
  if (running || !state || !$("prompt").value.trim()) return;
  running = new AbortController();
  const { signal } = running;
  const high = alpha(), asked = request();
  $("go").disabled = true;
  $("stop").disabled = false;
  $("tag-1").textContent = `alpha ${high}`;
  $("reading").textContent = "";
  $("token-table").hidden = true;
  trouble(null);
  try {
    const texts = await Promise.all([answer(0, 0, asked, signal), answer(1, high, asked, signal)]);
    const [base, ortho] = await Promise.all(texts.map((text, side) => colour(side, text, high, asked, signal)));
    const rows = [...base.map((t) => ["0", t]), ...ortho.map((t) => [String(high), t])];
    table($("tokens-rows"), ["answer at alpha", "token", "log p at 0", `log p at ${high}`, "difference"],
      rows.map(([at, t]) => [at, JSON.stringify(t.text), Number(t.low.toFixed(3)), Number(t.high.toFixed(3)), Number((t.high - t.low).toFixed(3))]));
    $("token-table").hidden = rows.length === 0;
  } catch (error) {
    if (error.name !== "AbortError") trouble(error.message);
  } finally {
    running = null;
    $("go").disabled = false;
    $("stop").disabled = true;
    document.body.dataset.answers = String(Number(document.body.dataset.answers ?? 0) + 1);
  }
}

async function runSweep(event) {
  event.preventDefault();
  const files = { forget: $("forget").files[0], retain: $("retain").files[0] };
  if (!files.forget && !files.retain) { $("progress-text").textContent = "Choose a file first."; return; }
  const button = $("run-sweep"), bar = $("progress");
  button.disabled = true;
  trouble(null);
  try {
    const alphas = (state.levels ?? ALPHAS).filter((a) => a <= state.max_alpha);
    const sets = {};
    for (const [name, file] of Object.entries(files)) {
      if (!file) continue;
      try { sets[name] = readExamples(await file.text(), $("form").value === "chat" ? null : state.plain).slice(0, MOST); } catch (error) { throw new Error(`${file.name}, ${error.message}`); }
      if (!sets[name].length) throw new Error(`${file.name} is empty`);
    }
    const total = Object.values(sets).reduce((n, set) => n + set.length, 0);
    const found = { alphas, forget: null, retain: null, goal: null };
    let before = 0;
    bar.hidden = false;
    for (const [name, examples] of Object.entries(sets)) {
      found[name] = await measure(state.model, examples, alphas, (done) => {
        bar.value = (before + done) / total;
        $("progress-text").textContent = `${before + done} of ${total}`;
      });
      before += examples.length;
    }
    sweep = found;
    const counts = Object.entries(sets).map(([name, set]) => `${set.length} of the ${name} set`).join(", ");
    $("sweep-source").textContent = `Answer probability (mean over answers of the probability per token), measured now: ${counts}.`;
    $("progress-text").textContent = "";
    showAlpha();
  } catch (error) {
    $("progress-text").textContent = "";
    trouble(error.message);
  } finally {
    button.disabled = false;
    bar.hidden = true;
  }
}

function tile(title, value, note) {
  return element("div", { class: "tile" }, element("span", { class: "soft" }, title), element("b", {}, ...value), element("span", { class: "soft" }, note));
}

const brief = (value) => (value === undefined || value === null ? "–" : value >= 1000 ? value.toExponential(1) : value.toPrecision(3));
const size = (bytes) => (bytes >= 2 ** 20 ? `${(bytes / 2 ** 20).toFixed(1)} MiB` : `${Math.round(bytes / 1024)} KiB`);

function showReport() {
  const { report } = state;
  if (!report) {
    $("tiles").replaceChildren(element("p", { class: "soft" }, "This checkpoint has no report.json."));
    $("layer-box").hidden = $("layers-title").hidden = true;
    return;
  }
  const pair = (values) => [brief(values?.["0.0"]), element("span", { class: "arrow" }, " → "), brief(values?.["1.0"])];
  const { totals } = report;
  const tiles = [];
  if (report.forget_ppl) tiles.push(tile("forget perplexity", pair(report.forget_ppl), `alpha 0 → 1, ${report.forget_sequences ?? "?"} sequences`));
  if (report.retain_ppl) tiles.push(tile("retain perplexity", pair(report.retain_ppl), `alpha 0 → 1, ${report.retain_sequences ?? "?"} sequences`));
  tiles.push(tile("ortho stream", [`${(100 * totals.density).toFixed(2)} %`], `of the split layers: ${size(totals.ortho_bytes)} beside ${size(totals.base_bytes)}`));
  tiles.push(tile("method", [report.method ?? "–"], `${report.layers.length} layers split, ${report.skipped} left; base ${report.storage ?? "as stored"}`));
  const verdict = { true: "forgotten", false: "not reached", null: "no aim" }[String(report.reached)];
  tiles.push(tile("goal", [verdict], report.seconds ? `in ${Math.round(report.seconds)} s` : ""));
  $("tiles").replaceChildren(...tiles, ...report.warnings.map((warning) => element("p", { class: "trouble" }, warning)));
  drawLayers($("layers"), report.layers);
  table($("layer-rows"), ["layer", "base error", "final error", "density", "rank"],
    report.layers.map((l) => [l.name, Number(l.base_error.toFixed(4)), Number(l.final_error.toFixed(4)), `${(100 * l.density).toFixed(3)} %`, l.rank ?? "–"]));
}

async function load() {
  try {
    state = await get("/ui/state");
  } catch (error) {
    $("key-box").open = true;
    trouble(error.message);
    return;
  }
  trouble(null);
  $("model").textContent = state.model;
  $("ortho").textContent = `ortho ${state.ortho}`;
  $("ortho").classList.toggle("present", state.ortho === "present");
  $("digest").textContent = `base sha256 ${state.digest.slice(0, 12)}`;
  $("key-box").hidden = state.key === "owner";
  $("tokens").max = state.limits.max_tokens;
  $("alpha").max = state.max_alpha;
  $("alpha").disabled = state.max_alpha === 0;
  $("alpha").value = state.max_alpha;
  $("alpha-most").textContent = state.max_alpha === 0 ? (state.ortho === "present" ? "a key allows more" : `ortho ${state.ortho}`) : `${state.max_alpha} · memory on`;
  $("form").querySelector("[value=chat]").disabled = !state.chat;
  $("form").value = state.chat ? state.form : "plain";
  sweep = fromSummary(state.sweep);
  if (sweep) $("sweep-source").textContent = `Answer probability at each alpha, as measured when the split was made (${state.sweep.source}).`;
  showAlpha();
  showReport();
  document.body.dataset.ready = "yes";
}

for (const side of [0, 1]) {
  $(`answer-${side}`).classList.add("empty");
  $(`answer-${side}`).dataset.empty = "Ask something above.";
}
$("ask").addEventListener("submit", ask);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey || !event.shiftKey)) { event.preventDefault(); $("ask").requestSubmit(); }
});
$("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
$("alpha").addEventListener("input", showAlpha);
$("measure").addEventListener("submit", runSweep);
$("use-key").addEventListener("click", () => { useKey($("key").value); load(); });
new ResizeObserver(() => { if (sweep) drawSweep($("sweep"), sweep, alpha()); if (state?.report) drawLayers($("layers"), state.report.layers); }).observe(document.body);
// The address of a newer server, opened where the page is already: only its fragment changes.
window.addEventListener("hashchange", () => { if (location.hash.startsWith("#token=")) { useKeyOfAddress(); load(); } });
useKeyOfAddress();
load();
