// The server, asked. Errors carry the server's own words.

async function read(response) {
  const body = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(body.error?.message ?? `the server answered ${response.status}`);
  return body;
}

async function ask(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the server cannot be reached. Is `nurture serve` still running?");
  }
}

export const get = async (path) => read(await ask(path));

const posting = (body, signal) => ({ method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal });

export const post = async (path, body, signal) => read(await ask(path, posting(body, signal)));

/** Yield the chunks of a streamed completion. */
export async function* stream(path, body, signal) {
  const response = await ask(path, posting({ ...body, stream: true, stream_options: { include_usage: true } }, signal));
  if (!response.ok) await read(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

export const runPath = (run, ...rest) => ["/studio/runs", run, ...rest].map((part, index) => index ? encodeURIComponent(part) : part).join("/");
