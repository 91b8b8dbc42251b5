// Calls of the server: JSON, and OpenAI's streams of server-sent events.

let key = "";

export function useKey(value) { key = value.trim(); }

// `libortho ui` prints its address with a key in the fragment. It is taken out of the address at once,
// and kept for this tab alone, which may be loaded again.
export function useKeyOfAddress() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given) {
    sessionStorage.setItem("token", given);
    history.replaceState(null, "", location.pathname);
  }
  useKey(sessionStorage.getItem("token") ?? "");
}

function headers() {
  const all = { "content-type": "application/json" };
  if (key) all.authorization = `Bearer ${key}`;
  return all;
}

async function checked(response) {
  if (response.ok) return response;
  let message = `the server answered ${response.status}`;
  try { message = (await response.json()).error.message; } catch { /* not JSON: the status must do */ }
  throw new Error(message);
}

export async function get(path) {
  return (await checked(await fetch(path, { headers: headers() }))).json();
}

export async function post(path, body, signal) {
  const init = { method: "POST", headers: headers(), body: JSON.stringify(body), signal };
  return (await checked(await fetch(path, init))).json();
}

// Calls `heard(text)` for each piece of the one answer; returns why it ended.
export async function stream(path, body, signal, heard) {
  const init = { method: "POST", headers: headers(), body: JSON.stringify({ ...body, stream: true }), signal };
  const response = await checked(await fetch(path, init));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "", finish = null;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return finish;
    held += value;
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") continue;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      for (const choice of chunk.choices) {
        heard(choice.delta ? choice.delta.content ?? "" : choice.text);
        finish = choice.finish_reason ?? finish;
      }
    }
  }
}
