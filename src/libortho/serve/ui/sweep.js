// The alpha sweep: from the split's own summary, or measured on files that the user chooses.

import { post } from "./api.js";

export const ALPHAS = [0, 0.25, 0.5, 0.75, 1];
export const MOST = 24;

// Rows "alpha 0", "alpha 0.5", ... of a summary as { alphas, forget, retain, goal }, or null.
export function fromSummary(summary) {
  if (!summary) return null;
  const found = Object.entries(summary.rows)
    .filter(([name]) => name.startsWith("alpha "))
    .map(([name, row]) => ({ alpha: Number(name.slice(6)), ...row }))
    .sort((a, b) => a.alpha - b.alpha);
  if (found.length < 2) return null;
  return {
    alphas: found.map((row) => row.alpha),
    forget: found.map((row) => row.forget_probability),
    retain: found.map((row) => row.retain_probability),
    goal: summary.rows.reference?.forget_probability ?? null,
  };
}

// JSONL -> [{ prompt or messages, completion }]: a question as `plain` has it, or as a message where
// that is null; a text is split after its first word.
export function readExamples(text, plain) {
  return text.split("\n").filter((line) => line.trim()).map((line, i) => {
    let row;
    try { row = JSON.parse(line); } catch { throw new Error(`line ${i + 1} is not JSON`); }
    if (typeof row.question === "string" && typeof row.answer === "string") {
      if (plain === null) return { messages: [{ role: "user", content: row.question }], completion: row.answer };
      return { prompt: plain.replace("{}", () => row.question), completion: ` ${row.answer}` };
    }
    const words = typeof row.text === "string" ? row.text.match(/^(\s*\S+)(\s[\s\S]*\S)\s*$/) : null;
    if (!words) throw new Error(`line ${i + 1}: expected "question" and "answer", or a "text" of two words or more`);
    return { prompt: words[1], completion: words[2] };
  });
}

// Mean over examples of P(completion | prompt)^(1 / tokens), at each alpha.
export async function measure(model, examples, alphas, told) {
  const sums = alphas.map(() => 0);
  for (const [i, example] of examples.entries()) {
    const score = await post("/v1/score", { model, ...example, alphas });
    score.data.forEach((row, a) => {
      sums[a] += Math.exp(row.logprobs.reduce((x, y) => x + y, 0) / row.logprobs.length);
    });
    told(i + 1);
  }
  return sums.map((sum) => sum / examples.length);
}
