// The page: a clip (recorded, uploaded or an example) becomes a 16 kHz wav here, and is asked.
"use strict";
const RATE = 16000, NOISE = [null, 30, 20, 15, 10, 5, 0, -5, -10];  // dB of speech over noise
const at = id => document.getElementById(id);
let samples = null, raw = null, talk = null, busy = 0, examples = {};
const histories = {};  // of each model, as the protocol has messages

function say(problem) { at("problem").textContent = problem; }
function element(kind, name, text = "") {
  const made = document.createElement(kind);
  made.className = name;
  made.textContent = text;
  return made;
}

async function ask(path, options = {}) {
  const headers = {...options.headers};
  if (at("key").value) headers.Authorization = `Bearer ${at("key").value}`;
  let response;
  try {
    response = await fetch(path, {...options, headers});
  } catch {
    throw new Error("The server does not answer: see that it runs, then ask again.");
  }
  if (response.ok) return response;
  if (response.status === 401) at("key-field").hidden = false;
  const body = await response.json().catch(() => ({}));
  throw new Error(body.error?.message ?? `The server answered ${response.status}.`);
}

function wav(clip) {
  const view = new DataView(new ArrayBuffer(44 + 2 * clip.length));
  const text = (offset, word) => [...word].forEach((c, i) => view.setUint8(offset + i, c.charCodeAt(0)));
  text(0, "RIFF"); view.setUint32(4, 36 + 2 * clip.length, true); text(8, "WAVEfmt ");
  view.setUint32(16, 16, true); view.setUint16(20, 1, true); view.setUint16(22, 1, true);
  view.setUint32(24, RATE, true); view.setUint32(28, 2 * RATE, true);
  view.setUint16(32, 2, true); view.setUint16(34, 16, true);
  text(36, "data"); view.setUint32(40, 2 * clip.length, true);
  clip.forEach((x, i) => view.setInt16(44 + 2 * i, Math.max(-1, Math.min(1, x)) * 32767, true));
  return new Uint8Array(view.buffer);
}

function base64(bytes) {
  let text = "";
  for (let i = 0; i < bytes.length; i += 32768) text += String.fromCharCode(...bytes.subarray(i, i + 32768));
  return btoa(text);
}

function noisy(clip) {
  const over = NOISE[at("noise").value];
  if (over === null) return clip;
  const power = clip.reduce((sum, x) => sum + x * x, 0) / clip.length;
  const scale = Math.sqrt(3 * power / 10 ** (over / 10));  // of uniform noise
  return clip.map(x => x + scale * (2 * Math.random() - 1));
}

function show() {  // the clip as it will be asked
  const canvas = at("wave"), pen = canvas.getContext("2d");
  pen.clearRect(0, 0, canvas.width, canvas.height);
  at("clip").hidden = !samples;
  at("send").disabled = busy > 0 || !(samples || raw || at("text").value.trim());
  if (!samples) return;
  const clip = noisy(samples), step = clip.length / canvas.width;
  pen.fillStyle = getComputedStyle(document.body).color;
  for (let x = 0; x < canvas.width; x++) {
    let peak = 0;
    for (let i = Math.floor(x * step); i < (x + 1) * step; i++) peak = Math.max(peak, Math.abs(clip[i] ?? 0));
    const height = Math.max(1, Math.min(1, peak) * canvas.height);
    pen.fillRect(x, (canvas.height - height) / 2, 1, height);
  }
  URL.revokeObjectURL(at("clip").src);
  at("clip").src = URL.createObjectURL(new Blob([wav(clip)], {type: "audio/wav"}));
  canvas.setAttribute("aria-label", `Waveform of the clip, ${(clip.length / RATE).toFixed(1)} seconds`);
}

function take(clip) {
  [samples, raw] = [clip, null];
  const silent = clip.every(x => Math.abs(x) < 0.005);
  say(silent ? "This clip is silent: check the microphone, or ask it all the same." : "");
  show();
}

async function read(bytes, name) {
  [samples, raw] = [null, null];
  show();
  try {
    const context = new OfflineAudioContext(1, 1, RATE);  // decodes to its own rate
    const sound = await context.decodeAudioData(bytes.slice(0));
    const clip = sound.getChannelData(0).slice();
    for (let c = 1; c < sound.numberOfChannels; c++) sound.getChannelData(c).forEach((x, i) => { clip[i] += x; });
    take(clip.map(x => x / sound.numberOfChannels));
  } catch {  // the server may know the format
    raw = {data: base64(new Uint8Array(bytes)), format: (name.split(".").pop() || "wav").toLowerCase()};
    say("");
    show();
  }
}

async function start() {
  if (talk) return;
  const mine = talk = {blocks: [], wanted: true};
  try {
    const plain = {echoCancellation: false, noiseSuppression: false, autoGainControl: false};  // as it was recorded to train
    mine.stream = await navigator.mediaDevices.getUserMedia({audio: {channelCount: 1, ...plain}});
    mine.context = new AudioContext({sampleRate: RATE});
    await mine.context.audioWorklet.addModule("/recorder.js");
    const node = new AudioWorkletNode(mine.context, "recorder");
    node.port.onmessage = event => mine.blocks.push(event.data);
    mine.context.createMediaStreamSource(mine.stream).connect(node);
    at("record").classList.add("on");
    at("record").textContent = "Listening: let go to ask";
    say("");
  } catch (error) {
    mine.wanted = false;
    say(error.name === "NotAllowedError"
      ? "The browser denies the microphone: allow it for this page, or upload a recording."
      : "No microphone can be used here: upload a recording.");
  }
  if (!mine.wanted) stop();
}

async function stop() {
  const mine = talk;
  if (!mine) return;
  const asked = mine.wanted;
  mine.wanted = false;
  if (!mine.context && asked) return;  // it is let go before it began: start() ends it
  talk = null;
  at("example").value = "";
  mine.stream?.getTracks().forEach(track => track.stop());
  await mine.context?.close();
  at("record").classList.remove("on");
  at("record").textContent = "Hold to talk";
  const clip = new Float32Array(mine.blocks.reduce((sum, block) => sum + block.length, 0));
  let place = 0;
  for (const block of mine.blocks) { clip.set(block, place); place += block.length; }
  if (clip.length > RATE / 5) { take(spoken(clip)); await send(); }
  else if (mine.context) say("That was too short: hold the button while you speak.");
}

function spoken(clip) {  // without the pauses at both ends but 0.2 s: the demo was trained on clips that have none
  const loud = 0.05 * clip.reduce((peak, x) => Math.max(peak, Math.abs(x)), 0), speaks = x => Math.abs(x) > loud;
  return loud ? clip.slice(Math.max(0, clip.findIndex(speaks) - RATE / 5), clip.findLastIndex(speaks) + RATE / 5) : clip;
}

async function stream(model, content, reply) {
  const messages = [...(histories[model] ?? []), {role: "user", content}];
  const response = await ask("/v1/chat/completions", {
    method: "POST",
    headers: {"Content-Type": "application/json"},
    body: JSON.stringify({model, messages, stream: true}),
  });
  const said = {role: "assistant", content: "", heard: ""};
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let left = "", ended = false;
  try {
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      const events = (left + part.value).split("\n\n");
      left = events.pop();
      for (const event of events) {
        const text = event.replace(/^data: /, "");
        if (text === "[DONE]") { ended = true; continue; }
        const chunk = JSON.parse(text);
        if (chunk.error) throw new Error(chunk.error.message);
        const delta = chunk.choices[0]?.delta ?? {};
        said.content += delta.content ?? "";
        said.heard = delta.heard ?? said.heard;
        reply(said, chunk.speechfuse);
      }
    }
  } catch (error) {
    if (error instanceof TypeError) ended = false; else throw error;  // the connection broke
  }
  if (!ended) throw new Error("The server ended in mid-answer: start it again, then ask again.");
  histories[model] = [...messages, said];
}

function paint(canvas, codes) {
  const pen = canvas.getContext("2d");
  [canvas.width, canvas.height] = [Math.max(1, codes.length), 1];
  codes.forEach((code, x) => {
    pen.fillStyle = `hsl(${(code * 137.5) % 360} 70% ${35 + code * 7 % 30}%)`;
    pen.fillRect(x, 0, 1, 1);
  });
  canvas.setAttribute("aria-label", `The clip as ${codes.length} codes: ${codes.join(" ")}`);
}

async function one(model, content, replies) {
  const box = element("div", "reply"), codes = element("canvas", "codes");
  const [heard, answer, parts] = [["p", "heard"], ["p", "answer"], ["p", "parts"]].map(x => element(...x));
  codes.hidden = true;
  codes.setAttribute("role", "img");
  box.append(element("p", "who", model), codes, heard, answer, parts);
  replies.append(box);
  try {
    await stream(model, content, (said, more) => {
      const clip = more?.codes.at(-1);
      if (clip?.length) { codes.hidden = false; paint(codes, clip); }
      if (said.heard) heard.textContent = `heard: ${said.heard}`;
      answer.textContent = said.content;
      if (more) parts.textContent = Object.entries(more.seconds)
        .map(([name, s]) => `${name.replace("_", " ")} ${Math.round(1000 * s)} ms`).join(" · ");
    });
    answer.textContent ||= "The model answers nothing.";
  } catch (error) {
    answer.classList.add("failed");
    answer.textContent = error.message;
  }
}

async function send() {
  const text = at("text").value.trim(), content = [];
  if (text) content.push({type: "text", text});
  const audio = samples ? {data: base64(wav(noisy(samples))), format: "wav"} : raw;
  if (audio) content.push({type: "input_audio", input_audio: audio});
  if (!content.length || busy) return;
  busy = 1;
  show();
  const turn = element("div", "turn"), replies = element("div", "replies");
  const clip = samples ? `${(samples.length / RATE).toFixed(1)} s of speech` : raw ? "a recording" : "";
  turn.append(element("p", "who", `You: ${[text, clip].filter(Boolean).join(", ")}`), replies);
  at("said").append(turn);
  turn.scrollIntoView({block: "nearest"});
  const models = [...new Set([at("model").value, at("other").value].filter(Boolean))];
  await Promise.all(models.map(model => one(model, content, replies)));
  busy = 0;
  show();
}

async function models() {
  try {
    const {data} = await (await ask("/v1/models")).json();
    for (const id of ["model", "other"])
      at(id).replaceChildren(...(id === "other" ? [new Option("none", "")] : []), ...data.map(m => new Option(m.id)));
    say("");
  } catch (error) { say(error.message); }
}

function ready() {
  const button = at("record");
  if (!window.isSecureContext || !navigator.mediaDevices) {
    button.disabled = true;
    at("record-help").textContent =
      "Over plain http from another machine browsers give no microphone: upload a recording, or serve https (tls_cert=, tls_key=).";
  }
  button.addEventListener("pointerdown", event => { button.setPointerCapture(event.pointerId); start(); });
  for (const name of ["pointerup", "pointercancel", "blur"]) button.addEventListener(name, stop);
  button.addEventListener("keydown", event => {
    if (event.key === " " || event.key === "Enter") { event.preventDefault(); if (!event.repeat) start(); }
  });
  button.addEventListener("keyup", event => { if (event.key === " " || event.key === "Enter") stop(); });
  at("file").addEventListener("change", async event => {
    const file = event.target.files[0];
    if (file) await read(await file.arrayBuffer(), file.name);
    event.target.value = "";
  });
  at("example").addEventListener("change", async event => {
    const data = examples[event.target.value];
    if (data) await read(Uint8Array.from(atob(data), c => c.charCodeAt(0)).buffer, "a.wav");
  });
  at("noise").addEventListener("input", () => {
    const over = NOISE[at("noise").value];
    at("noise-shown").textContent = over === null ? "none" : `${over} dB below the speech`.replace("-", "minus ");
    show();
  });
  at("text").addEventListener("input", show);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
  at("text").addEventListener("keydown", event => { if (event.key === "Enter") send(); });
  at("key").addEventListener("change", models);
  at("send").addEventListener("click", send);
  at("new").addEventListener("click", () => {
    for (const model of Object.keys(histories)) delete histories[model];
    at("said").replaceChildren();
  });
  models();
  ask("/examples").then(response => response.json()).then(found => {
    examples = found;
    at("example").append(...Object.keys(found).map(text => new Option(text)));
  }).catch(() => {});
}
ready();
