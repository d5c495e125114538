// Everything that is shown goes in as text, never as markup.
"use strict";

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
let shown = null;

function element(name, attributes = {}, text = "", space = null) {
  const made = space ? document.createElementNS(space, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text) made.textContent = text;
  return made;
}

const number = (value) => (value === null ? "∞" : Number(value).toPrecision(3));

async function begin() {
  const about = await (await fetch("api/about")).json();
  const gates = about.guardrails.map((one) => `${one.id}: ${one.gate} > ${number(one.threshold)}`).join("; ");
  $("about").textContent = `${about.model}${gates ? "; " + gates : ""}. To forget: ${about.forget.join(", ") || "not said"}.`;
  $("chat").checked = about.chat;
  $("chat").parentElement.hidden = !about.has_chat;
  $("on-trigger").value = about.on_trigger;
  $("max-new-tokens").value = about.max_new_tokens;
  for (const example of about.examples) {
    const button = element("button", { type: "button", title: example.label }, `${example.label}: ${example.prompt}`);
    button.addEventListener("click", () => { $("prompt").value = example.prompt; ask(); });
    $("examples").append(button);
  }
}

async function ask() {
  if ($("ask").disabled || !$("prompt").value.trim()) return;
  $("ask").disabled = true;
  say("Asking both.", "");
  try {
    const answer = await fetch("api/ask", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({
        prompt: $("prompt").value,
        chat: $("chat").checked,
        on_trigger: $("on-trigger").value,
        max_new_tokens: Number($("max-new-tokens").value),
      }),
    });
    const found = await answer.json();
    if (found.error) say(found.error, "failed");
    else show(found);
  } catch (error) {
    say(`No answer: ${error.message}. Is dsg still running?`, "failed");
  } finally {
    $("ask").disabled = false;
  }
}

function say(text, state) {
  $("status").textContent = text;
  $("status").className = state;
}

function show(found) {
  shown = found;
  $("result").hidden = false;
  $("base").textContent = found.base.text;
  $("guarded").textContent = found.guarded.text;
  const open = found.guardrails.find((one) => one.latched_at !== null);
  if (open) {
    const token = found.tokens[open.latched_at];
    say(`The gate of ${open.id} opened at token ${open.latched_at + 1} of ${found.tokens.length}, “${token.trim()}”.`, "open");
  } else if (found.guarded.refused) say("A filter refused.", "open");
  else if (found.guardrails.length) say("The gate stayed closed.", "closed");
  else say("No guardrail with a gate is at work here.", "closed");
  const by = $("by");
  by.replaceChildren();
  found.guardrails.forEach((one, i) => {
    by.append(element("option", { value: `${i}` }, `the gate's token score, ${one.id}`));
    one.features.forEach((feature, j) =>
      by.append(element("option", { value: `${i}:${j}` }, `feature ${feature.index} (${feature.roles.join(", ")})`)));
  });
  colour();
  draw();
}

function colour() {
  const [i, j] = $("by").value.split(":").map(Number);
  const one = shown.guardrails[i];
  const values = one ? (j === undefined ? one.score : one.features[j].activations) : [];
  // From a token on which no feature is active, to one as strong as two of the gate's thresholds.
  const floor = one && j === undefined ? one.floor : 0;
  const strongest = Math.max(...values.map((value) => Math.abs(value ?? 0)));
  const largest = (one && j === undefined ? Math.max(2 * one.threshold, strongest) : strongest) - floor || 1;
  $("tokens").replaceChildren(...shown.tokens.map((text, t) => {
    const span = element("span", { class: "token" }, text);
    const value = t < values.length ? values[t] : 0;
    span.title = `token ${t + 1}: ${number(value)}`;
    const share = value === null ? 1 : value === 0 ? 0 : (value - floor) / largest;
    if (Math.abs(share) > 0.01) span.style.background = `rgba(var(${share > 0 ? "--heat" : "--cold"}), ${(0.75 * Math.abs(share)).toFixed(3)})`;
    if (one?.clamped[t]) span.classList.add("clamped");
    if (t >= shown.n_prompt) span.classList.add("written");
    if (one?.latched_at === t) span.classList.add("latch");
    return span;
  }));
}

function draw() {
  const i = Number(($("by").value || "0").split(":")[0]);
  const one = shown.guardrails[i];
  $("chart").replaceChildren();
  $("caption").textContent = "";
  if (!one || !one.statistic.length) return;
  const [width, height, left, bottom, top] = [Math.max(300, $("chart").clientWidth), 180, 50, 24, 10];
  const finite = one.statistic.filter((value) => value !== null);
  const highest = Math.max(one.threshold * 1.15, ...finite) || 1, lowest = Math.min(0, one.threshold, ...finite);
  const n = one.statistic.length;
  const x = (t) => left + ((t + 0.5) * (width - left - 10)) / n;
  const y = (value) => {
    const share = ((value === null ? highest : value) - lowest) / (highest - lowest || 1);
    return height - bottom - share * (height - bottom - top);
  };
  const said = `Statistic of ${one.id} (${one.gate}) after each token: largest ${number(Math.max(...finite))}, threshold ${number(one.threshold)}`
    + (one.latched_at === null ? "; never exceeded." : `; exceeded at token ${one.latched_at + 1}.`);
  const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": said }, "", SVG);
  const add = (name, attributes, text) => svg.append(element(name, attributes, text, SVG));
  add("line", { class: "axis", x1: left, x2: width - 10, y1: y(lowest), y2: y(lowest) });
  add("line", { class: "threshold", x1: left, x2: width - 10, y1: y(one.threshold), y2: y(one.threshold) });
  add("text", { x: left - 6, y: y(one.threshold) + 4, "text-anchor": "end" }, number(one.threshold));
  add("text", { x: left - 6, y: y(lowest) + 4, "text-anchor": "end" }, number(lowest));
  add("text", { x: left, y: height - 6 }, "token 1");
  add("text", { x: width - 10, y: height - 6, "text-anchor": "end" }, `${n}`);
  const points = one.statistic.map((value, t) => `${x(t).toFixed(1)},${y(value).toFixed(1)}`);
  add("polyline", { class: "statistic", points: points.join(" ") });
  if (one.latched_at !== null) {
    add("line", { class: "latch-line", x1: x(one.latched_at), x2: x(one.latched_at), y1: top, y2: height - bottom });
  }
  $("chart").append(svg);
  $("caption").textContent = said;
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); ask(); }
});
$("by").addEventListener("change", () => { colour(); draw(); });
addEventListener("resize", () => shown && draw());
begin().catch((error) => say(`The page could not begin: ${error.message}.`, "failed"));
