const $ = (id) => document.getElementById(id);
const messages = [];
let running = null;

for (const id of ["key", "system", "temperature", "tokens"]) {
  $(id).value = sessionStorage.getItem(id) ?? $(id).value;
  $(id).addEventListener("change", () => { sessionStorage.setItem(id, $(id).value); refresh(); });
}

async function call(path, options = {}) {
  const headers = { ...(options.headers ?? {}) };
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
  const response = await fetch(path, { ...options, headers });
  if (!response.ok) {
    const body = await response.json().catch(() => null);
    throw new Error(body?.error?.message ?? `The server answered ${response.status}.`);
  }
  return response;
}

function show(role, text = "") {
  const element = document.createElement("p");
  element.className = `message ${role}`;
  element.textContent = text;
  $("messages").append(element);
  element.scrollIntoView({ block: "end" });
  return element;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      if (part === "data: [DONE]") return;
      if (part.startsWith("data: ")) yield JSON.parse(part.slice(6));
    }
  }
}

// A short context has room for the prompt as well.
async function usualTokens() {
  const { data } = await (await call("v1/models")).json();
  return Math.min(512, Math.ceil(data[0].max_model_len / 2));
}

async function answer() {
  const thought = show("thought"), element = show("assistant", "…");
  let text = "";
  running = new AbortController();
  $("stop").hidden = false;
  $("send").disabled = true;
  try {
    const system = $("system").value.trim();
    const response = await call("v1/chat/completions", {
      method: "POST",
      signal: running.signal,
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({
        messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
        temperature: Number($("temperature").value),
        max_tokens: Number($("tokens").value) || await usualTokens(),
        stream: true,
      }),
    });
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const delta = event.choices[0]?.delta ?? {};
      if (delta.reasoning_content) thought.textContent += delta.reasoning_content;
      if (delta.content) { text += delta.content; element.textContent = text; element.scrollIntoView({ block: "end" }); }
    }
  } catch (error) {
    if (error.name !== "AbortError") show("error", error.message);
  }
  if (!thought.textContent) thought.remove();
  if (text) messages.push({ role: "assistant", content: text });
  else { element.remove(); messages.pop(); }
  running = null;
  $("stop").hidden = true;
  $("send").disabled = false;
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text || running) return;
  messages.push({ role: "user", content: text });
  show("user", text);
  $("text").value = "";
  answer();
});
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("ask").requestSubmit(); }
});
$("stop").addEventListener("click", () => running?.abort());
$("reset").addEventListener("click", () => { running?.abort(); messages.length = 0; $("messages").replaceChildren(); });

$("upload").addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    const form = new FormData();
    form.append("purpose", "batch");
    form.append("file", $("file").files[0]);
    $("uploaded").textContent = "Uploading …";
    const file = await (await call("v1/files", { method: "POST", body: form })).json();
    const batch = await (await call("v1/batches", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ input_file_id: file.id, endpoint: "/v1/chat/completions", completion_window: "24h",
        metadata: { name: file.filename } }),
    })).json();
    $("uploaded").textContent = `${file.filename} is batch ${batch.id}.`;
    $("upload").reset();
  } catch (error) {
    $("uploaded").textContent = error.message;
  }
  refresh();
});

async function download(id) {
  const blob = await (await call(`v1/files/${id}/content`)).blob();
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = `${id}.jsonl`;
  link.click();
  URL.revokeObjectURL(link.href);
}

function button(text, action) {
  const element = document.createElement("button");
  element.type = "button";
  element.textContent = text;
  element.addEventListener("click", () => action().then(refresh, (error) => { $("uploaded").textContent = error.message; }));
  return element;
}

function row(batch) {
  const line = document.createElement("tr");
  const cells = [0, 1, 2, 3].map(() => line.appendChild(document.createElement("td")));
  const { total, completed, failed } = batch.request_counts;
  cells[0].textContent = batch.metadata?.name ?? batch.id;
  cells[1].textContent = batch.errors?.data[0]?.message ?? batch.status.replace("_", " ");
  const bar = document.createElement("progress");
  [bar.max, bar.value] = [total || 1, completed + failed];
  cells[2].append(bar, ` ${completed + failed} of ${total}${failed ? `, ${failed} failed` : ""}`);
  if (batch.output_file_id) cells[3].append(button("Answers", () => download(batch.output_file_id)));
  if (batch.error_file_id) cells[3].append(button("Errors", () => download(batch.error_file_id)));
  if (["validating", "in_progress"].includes(batch.status))
    cells[3].append(button("Cancel", () => call(`v1/batches/${batch.id}/cancel`, { method: "POST" })));
  return line;
}

async function refresh() {
  try {
    const health = await (await call("health")).json();
    $("model").textContent = health.model;
    $("state").textContent = `mpillm ${health.version}: ${health.running} running, ${health.waiting} waiting`;
    if (!$("batches").hidden) {
      const found = await (await call("v1/batches")).json();
      $("list").replaceChildren(...found.data.map(row));
    }
  } catch (error) {
    $("state").textContent = error.message === "Failed to fetch" ? "The server does not answer." : error.message;
  }
}

for (const tab of document.querySelectorAll("nav button"))
  tab.addEventListener("click", () => {
    for (const other of document.querySelectorAll("nav button")) {
      other.setAttribute("aria-pressed", String(other === tab));
      $(other.dataset.view).hidden = other !== tab;
    }
    refresh();
  });

refresh();
setInterval(refresh, 2000);
