const $ = (id) => document.getElementById(id);
const messages = [];
const GONE = "The server does not answer.", CUT = "The connection to the server ended before the answer did.";
const rows = new Map();  // of batches, by their ids
let running = null;

for (const id of ["key", "name", "system", "temperature", "tokens"]) {
  $(id).value = sessionStorage.getItem(id) ?? $(id).value;
  $(id).addEventListener("change", () => { sessionStorage.setItem(id, $(id).value); refresh(); });
}

async function call(path, options = {}) {
  const headers = { ...(options.headers ?? {}) };
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
  const response = await fetch(path, { ...options, headers }).catch((error) => {
    throw error.name === "AbortError" ? error : new Error(GONE);
  });
  if (!response.ok) {
    const body = await response.json().catch(() => null);
    const hint = response.status === 401 ? " Type it under Settings." : "";
    throw new Error((body?.error?.message ?? `The server answered ${response.status}.`) + hint);
  }
  return response;
}

function show(role, text = "") {
  const element = document.createElement("div");
  element.className = `message ${role}`;
  element.textContent = text;
  $("messages").append(element);
  element.scrollIntoView({ block: "end" });
  return element;
}

// What stands between fences is shown as code; nothing is taken for HTML.
function render(element, text) {
  element.replaceChildren(...text.split(/^```.*$\n?/m).map((part, index) => {
    if (index % 2 === 0) return part;
    const code = document.createElement("pre");
    code.textContent = part;
    return code;
  }));
}

// Whoever reads further up stays there.
function follow(element, change) {
  const page = document.documentElement;
  const atEnd = page.scrollHeight - page.clientHeight - page.scrollTop < 80;
  change();
  if (atEnd) element.scrollIntoView({ block: "end" });
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new Error(CUT);
    });
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      if (part === "data: [DONE]") return;
      if (part.startsWith("data: ")) yield JSON.parse(part.slice(6));
    }
  }
}

async function loadModels() {
  const { data } = await (await call("v1/models")).json();
  if ($("name").length !== data.length) {
    $("name").replaceChildren(...data.map((model) => new Option(model.id)));
    $("name").value = sessionStorage.getItem("name") ?? data[0].id;
    if (!$("name").value) $("name").value = data[0].id;
  }
  $("context").textContent = `A prompt and its answer have up to ${data[0].max_model_len} tokens.`;
  // A short context has room for the prompt as well.
  $("tokens").placeholder = Math.min(512, Math.ceil(data[0].max_model_len / 2));
}

async function answer(question) {
  const thought = show("thought"), element = show("assistant", "…");
  let text = "";
  running = new AbortController();
  $("messages").ariaBusy = "true";  // a screen reader reads the answer when it is complete
  $("stop").hidden = false;
  $("send").disabled = true;
  try {
    await loadModels();
    const system = $("system").value.trim();
    const response = await call("v1/chat/completions", {
      method: "POST",
      signal: running.signal,
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({
        model: $("name").value,
        messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
        temperature: Number($("temperature").value),
        max_tokens: Number($("tokens").value) || Number($("tokens").placeholder),
        stream: true,
      }),
    });
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const delta = event.choices[0]?.delta ?? {};
      if (delta.reasoning_content) follow(element, () => thought.append(delta.reasoning_content));
      if (delta.content) follow(element, () => { text += delta.content; render(element, text); });
    }
  } catch (error) {
    if (error.name !== "AbortError") show("error", error.message);
  }
  if (!thought.textContent) thought.remove();
  if (text) messages.push({ role: "assistant", content: text });
  else {  // the question goes back to where it was typed
    element.remove();
    question.remove();
    $("text").value ||= messages.pop()?.content ?? "";
  }
  running = null;
  $("messages").ariaBusy = "false";
  if (document.activeElement === $("stop")) $("text").focus();
  $("stop").hidden = true;
  $("send").disabled = false;
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text || running) return;
  messages.push({ role: "user", content: text });
  $("text").value = "";
  answer(show("user", text));
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
      body: JSON.stringify({ input_file_id: file.id, completion_window: "24h",
        metadata: { name: file.filename } }),
    })).json();
    $("uploaded").textContent = `${file.filename} is batch ${batch.id}.`;
    $("upload").reset();
  } catch (error) {
    $("uploaded").textContent = error.message;
  }
  refresh();
});

async function download(id, name) {
  const blob = await (await call(`v1/files/${id}/content`)).blob();
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
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

// The row of a batch, which is made anew only if there is something new: else a button would lose the focus.
function row(batch) {
  const news = JSON.stringify(batch), old = rows.get(batch.id);
  if (old?.news === news) return old.line;
  const line = old?.line ?? document.createElement("tr");
  const focused = [...line.querySelectorAll("button")].find((one) => one === document.activeElement)?.textContent;
  fill(line, batch);
  rows.set(batch.id, { line, news });
  queueMicrotask(() => {
    const buttons = [...line.querySelectorAll("button")];
    const next = buttons.find((one) => one.textContent === focused) ?? buttons[0] ?? document.querySelector("[data-view=batches]");
    if (focused) next.focus();  // a keyboard goes on from here, also where the button is no more
  });
  return line;
}

function duration(seconds) {
  const [minutes, hours] = [Math.round(seconds / 60), Math.round(seconds / 3600)];
  return minutes < 2 ? `${seconds} s` : hours < 3 ? `${minutes} min` : `${hours} h`;
}

function fill(line, batch) {
  line.replaceChildren();
  const cells = [0, 1, 2, 3].map(() => line.appendChild(document.createElement("td")));
  const { total, completed, failed } = batch.request_counts;
  cells[0].textContent = batch.metadata?.name ?? batch.id;
  const why = batch.errors?.data[0]?.message;
  cells[1].textContent = batch.status.replace("_", " ") + (why ? `: ${why}` : "");
  const bar = document.createElement("progress");
  [bar.max, bar.value, bar.ariaLabel] = [total || 1, completed + failed, "finished requests"];
  const left = batch.seconds_left === null ? "" : `, ${duration(batch.seconds_left)} left`;
  if (total) cells[2].append(bar, ` ${completed + failed} of ${total}${failed ? `, ${failed} failed` : ""}${left}`);
  if (batch.output_file_id)
    cells[3].append(button("Answers", () => download(batch.output_file_id, `${batch.id}_output.jsonl`)));
  if (batch.error_file_id)
    cells[3].append(button("Errors", () => download(batch.error_file_id, `${batch.id}_errors.jsonl`)));
  if (["validating", "in_progress"].includes(batch.status))
    cells[3].append(button("Cancel", () => call(`v1/batches/${batch.id}/cancel`, { method: "POST" })));
  for (const one of cells[3].children) one.ariaDescription = cells[0].textContent;
}

async function listBatches() {
  const { data } = await (await call("v1/batches")).json();
  const lines = data.map(row), list = $("list");
  if (lines.some((line, index) => list.children[index] !== line)) list.replaceChildren(...lines);
  $("none").hidden = lines.length > 0;
}

async function refresh() {
  try {
    const health = await (await call("health")).json();
    $("model").textContent = health.model;
    $("state").textContent = `mpillm ${health.version}: ${health.running} running, ${health.waiting} waiting`;
    if (!$("batches").hidden) await listBatches();
    if (!$("settings").hidden) await loadModels();
    $("state").className = "";
  } catch (error) {
    $("state").className = "error";
    $("state").textContent = error.message;
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

// On a phone the keyboard would cover half of the page.
if (matchMedia("(min-width: 40rem) and (not (pointer: coarse))").matches) $("text").focus();
refresh();
setInterval(refresh, 2000);
