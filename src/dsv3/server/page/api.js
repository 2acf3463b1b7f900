// The server's OpenAI API, at addresses relative to the page, so that it works behind a path prefix too.

import { setting, settings } from "./settings.js";

/** What went wrong, for a person: `title` says what, `message` the server's own words, `wait` seconds to wait. */
export class ApiError extends Error {
  constructor(title, message, { status = 0, wait = null } = {}) {
    super(message);
    Object.assign(this, { title, status, wait });
  }
}

/** The models that the server offers: [{id, max_model_len}]. */
export async function models() {
  return (await (await request("v1/models")).json()).data;
}

/** Yields the chunks of a streamed chat completion. Ends only after the server said that it is complete. */
export async function* complete(body, signal) {
  const whole = { ...body, stream: true, stream_options: { include_usage: true } };
  const headers = { "Content-Type": "application/json" };
  const options = { method: "POST", headers, body: JSON.stringify(whole), signal };
  const response = await request("v1/chat/completions", options);
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError("The server failed while it answered", chunk.error.message);
    yield chunk;
  }
  throw lost("The answer ended before it was complete.");
}

async function request(path, options = {}) {
  const key = setting("key");
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached", "Is it running, and is there a network?");
  }
  if (!response.ok) throw await failure(response);
  return response;
}

async function failure(response) {
  const { status } = response;
  const text = await response.text().catch(() => "");
  let error = {};
  try {
    error = JSON.parse(text).error ?? {};
  } catch {
    // A proxy's page, say: the status must do.
  }
  let message = error.message ?? (response.statusText || `HTTP status ${status}`);
  const titles = {
    401: "The server asks for an API key",
    429: "The server has too much to do",
    503: error.code === "server_busy" ? "The server has too much to do" : "The server is not ready",
  };
  let title = titles[status] ?? (status >= 500 ? "The server failed" : "The server did not accept this");
  if (error.code === "context_length_exceeded") {
    title = "This conversation is longer than the model can read";
    message += ". Shorten what you wrote, or begin a new chat.";
  }
  const wait = Number.parseFloat(response.headers.get("Retry-After"));
  return new ApiError(title, message, { status, wait: wait >= 0 ? Math.ceil(wait) : null });
}

const lost = (message) => new ApiError("The connection was lost", message);

/** Yields the data of each server-sent event. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (true) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = value.split("\n");
      lines[0] = rest + lines[0]; // only what is new is searched: a line may come in many pieces
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) yield line.slice(5).trim();
      }
    }
  } catch (error) {
    throw error.name === "AbortError" ? error : lost("The network failed while the answer came.");
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** The request's sampling parameters: those that were set, with OpenAI's and vLLM's names. */
export function sampling(values) {
  const set = settings.filter(({ name }) => Number.isFinite(values[name]));
  return Object.fromEntries(set.map(({ name }) => [name, values[name]]));
}
