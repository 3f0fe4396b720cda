// The gateway's API: requests with the reader's key, errors as ApiError, streams as events.
// The key is kept in sessionStorage: for this tab, until it is closed.

const KEY = "lamella-key";
const TIMEOUT_MS = 15000;

/** What the gateway answered that is not what was asked for; `status` 0 is no answer at all. */
export class ApiError extends Error {
  constructor(status, message, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (text) => sessionStorage.setItem(KEY, text),
  forget: () => sessionStorage.removeItem(KEY),
};

/** Return what a route answers; paths are relative to the page, so that a proxy may add to them. */
export async function ask(path, method = "GET") {
  const answer = await send(path, { method, signal: AbortSignal.timeout(TIMEOUT_MS) });
  try {
    return await answer.json();
  } catch {
    throw new ApiError(0, "The gateway's answer broke off; try again.");
  }
}

/** Yield the events of a streamed answer to `body`; aborting `signal` leaves, which cancels the job. */
export async function* stream(path, body, signal) {
  const answer = await send(path, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for await (const line of lines(reader)) {
      if (!line.startsWith("data:")) continue; // a comment that keeps the connection alive, or an empty line
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(200, event.error.message, event.error.code);
      yield event;
    }
  } finally {
    await reader.cancel().catch(() => {}); // aborted already
  }
  throw new ApiError(0, "The connection was lost before the answer ended.");
}

async function* lines(reader) {
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const found = (rest + value).split("\n");
    rest = found.pop();
    yield* found;
  }
}

async function send(path, options) {
  const headers = new Headers(options.headers);
  if (key.get()) headers.set("authorization", `Bearer ${key.get()}`);
  let answer;
  try {
    answer = await fetch(`../${path}`, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The gateway does not answer.");
  }
  if (!answer.ok) throw await said(answer);
  return answer;
}

async function said(answer) {
  try {
    const { error } = await answer.json();
    return new ApiError(answer.status, error.message, error.code);
  } catch {
    return new ApiError(answer.status, `The gateway answered with ${answer.status}.`);
  }
}
