// The search page. The server renders hits and documents; this script fetches them, replaces parts of the page,
// writes marks into banks, and shows which hits moved. Without it the same addresses work as plain pages.

const $ = (selector, within = document) => within.querySelector(selector);
const KEY = "epic-rag-key";
let busy = 0; // number of the latest request; answers to earlier ones are dropped

class Refused extends Error {}

async function request(address, options = {}) {
  const headers = { ...options.headers };
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(address, { ...options, headers, credentials: "omit" });
  } catch {
    throw new Refused("The server does not answer. Is it still running?");
  }
  return response;
}

async function api(method, address, body) {
  const response = await request(address, { method, body: body === undefined ? undefined : JSON.stringify(body) });
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Refused(answer.error?.message ?? `The server answered ${response.status}.`);
  return answer;
}

async function page(address) {
  const response = await request(address);
  const fetched = new DOMParser().parseFromString(await response.text(), "text/html");
  if (!$("#results", fetched)) throw new Refused(`The server answered ${response.status}.`);
  return fetched;
}

const bankAddress = (bank, rest = "") => `/v1/banks/${encodeURIComponent(bank)}${rest}`;
const results = () => $("#results");
const hits = () => [...document.querySelectorAll("article[data-id]")];
const ownBanks = () => [...document.querySelectorAll("select[name=bank] option[data-own=true]")].map((each) => each.value);

function say(text) {
  $("#learning").hidden = false;
  $("#said").textContent = text;
}

function address() {
  const fields = [...new FormData($("#search"))].filter(([, value]) => value !== "");
  return `/?${new URLSearchParams(fields)}`;
}

// Replace form and results by those of an address; hits that moved since are marked if `moved` is true.
async function show(target, { moved = false, keepFocus = false } = {}) {
  const turn = ++busy;
  results().setAttribute("aria-busy", "true");
  try {
    const fetched = await page(target);
    if (turn !== busy) return;
    const before = new Map(hits().map((each) => [each.dataset.id, Number(each.dataset.rank)]));
    const typed = $("#q")?.value;
    $("#search").replaceWith(document.adoptNode($("#search", fetched)));
    if (keepFocus && typed !== undefined && $("#q")) $("#q").value = typed;
    results().replaceWith(document.adoptNode($("#results", fetched)));
    document.title = fetched.title;
    enhance();
    if (moved) showMoves(before);
  } finally {
    if (turn === busy) results().removeAttribute("aria-busy");
  }
}

function showMoves(before) {
  for (const hit of hits()) {
    const rank = Number(hit.dataset.rank);
    const old = before.get(hit.dataset.id);
    if (old === rank) continue;
    const place = $(".move", hit);
    place.hidden = false;
    place.textContent = old === undefined ? "new" : old > rank ? `▲ from ${old}` : `▼ from ${old}`;
    hit.classList.add(old === undefined || old > rank ? "up" : "down");
  }
}

function moves() {
  const count = document.querySelectorAll("article.up, article.down").length;
  return count === 0 ? "No hit moved." : count === 1 ? "One hit moved." : `${count} hits moved.`;
}

function enhance() {
  for (const button of document.querySelectorAll(".mark")) button.hidden = !results().dataset.query;
  const bank = results().dataset.bank;
  if (bank && ownBanks().includes(bank)) showGain(bank);
  else $("#gain").textContent = "";
}

async function showGain(bank) {
  const place = $("#gain");
  place.dataset.bank = bank;
  let text;
  try {
    const found = await api("POST", bankAddress(bank, "/evaluate"), { index: results().dataset.index || undefined });
    text = found.description;
    $("#undo").hidden = !found.can_undo;
  } catch (error) {
    text = error.message;
  }
  if (place.dataset.bank !== bank) return;
  $("#learning").hidden = false;
  place.textContent = text;
}

// Return the bank that marks go to: the chosen one if it can be changed, else ask; undefined if cancelled.
async function bankForMarks() {
  const select = $("select[name=bank]");
  if (ownBanks().includes(select.value)) return select.value;
  const dialog = $("#choose");
  const choice = $("#choose-bank");
  choice.replaceChildren(...[...ownBanks(), ""].map((name) => new Option(name || "a new bank", name)));
  const showNew = () => { $("#choose-new").hidden = choice.value !== ""; };
  choice.onchange = showNew;
  showNew();
  dialog.returnValue = "";
  dialog.showModal();
  await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  if (dialog.returnValue !== "ok") return undefined;
  if (choice.value) return choice.value;
  const name = $("#choose-name").value;
  if (!ownBanks().includes(name)) await api("POST", "/v1/banks", { name, task: "docs" });
  return name;
}

function selectBank(bank) {
  const select = $("select[name=bank]");
  if (![...select.options].some((each) => each.value === bank)) {
    const option = new Option(bank, bank);
    option.dataset.own = "true";
    select.add(option);
  }
  select.value = bank;
}

async function rerun(said, focused) {
  await show(searched(), { moved: true, keepFocus: true });
  history.replaceState(null, "", searched());
  say(`${said} ${moves()}`);
  const hit = hits().find((each) => each.dataset.id === focused);
  (hit ?? results()).focus({ preventScroll: !hit });
}

// The address of the shown results with the bank that is chosen now; the query box may have other text meanwhile.
function searched() {
  const shown = new URL(location.href);
  const bank = $("select[name=bank]").value;
  if (bank) shown.searchParams.set("bank", bank);
  else shown.searchParams.delete("bank");
  return shown.pathname + shown.search;
}

async function markHit(button) {
  const hit = button.closest("article");
  const bank = await bankForMarks();
  if (bank === undefined) return;
  const relevant = button.dataset.relevant === "true";
  let said;
  if (button.getAttribute("aria-pressed") === "true" && bank === results().dataset.bank) {
    await api("DELETE", bankAddress(bank, `/examples/${button.dataset.example}`));
    said = `Removed from ${bank}.`;
  } else {
    const example = { query: results().dataset.query, passage: $(".text", hit).textContent, relevant };
    await api("POST", bankAddress(bank, "/examples"), { examples: [example] });
    said = `Marked in ${bank}: hit ${hit.dataset.rank} ${relevant ? "answers it" : "does not"}.`;
  }
  selectBank(bank);
  await rerun(said, hit.dataset.id);
}

async function undo() {
  const bank = results().dataset.bank;
  if (!bank) return;
  await api("POST", bankAddress(bank, "/undo"), {});
  await rerun("Undone.", undefined);
}

async function preview(hit) {
  const place = $(".preview", hit);
  const link = $("a.place", hit);
  if (!link) return;
  if (!place.hidden) {
    place.hidden = true;
    link.setAttribute("aria-expanded", "false");
    return;
  }
  await fillPreview(place, link.href);
  link.setAttribute("aria-expanded", "true");
}

async function fillPreview(place, target) {
  const fetched = await page(target);
  const found = $("#document", fetched) ?? $("#results .error", fetched);
  found.removeAttribute("id");
  place.replaceChildren(document.adoptNode(found));
  place.hidden = false;
}

const guarded = (work) => work.catch((error) => {
  if (!(error instanceof Refused)) throw error;
  say(error.message);
});

function submitSearch() {
  const target = address();
  return guarded(show(target).then(() => {
    history.pushState(null, "", target);
    $("#said").textContent = "";
    if (!$("#gain").textContent) $("#learning").hidden = true;
    results().focus();
  }));
}

document.addEventListener("submit", (event) => {
  if (event.target.id === "search") {
    event.preventDefault();
    submitSearch();
  } else if (event.target.id === "unlock") {
    event.preventDefault();
    sessionStorage.setItem(KEY, $("#key").value);
    guarded(unlock());
  }
});

document.addEventListener("change", (event) => {
  if (!event.target.matches("select[name]") || !results().dataset.query) return;
  if (event.target.name !== "bank") {
    submitSearch();
    return;
  }
  const target = searched();
  guarded(show(target, { moved: true, keepFocus: true }).then(() => {
    history.pushState(null, "", target);
    $("select[name=bank]").focus();
    say(`Bank: ${results().dataset.bank || "none"}. ${moves()}`);
  }));
});

document.addEventListener("click", (event) => {
  const button = event.target.closest("button.mark");
  const link = event.target.closest("a.place");
  const more = event.target.closest(".preview .more a");
  if (button) guarded(markHit(button));
  else if (event.target.id === "undo") guarded(undo());
  else if ((link || more) && !(event.ctrlKey || event.metaKey || event.shiftKey)) {
    event.preventDefault();
    guarded(link ? preview(link.closest("article")) : fillPreview(more.closest(".preview"), more.href));
  }
});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("#choose").open) return;
  const inField = event.target.matches("input, select, textarea");
  if (event.key === "/" && !inField && $("#q")) {
    event.preventDefault();
    $("#q").focus();
    $("#q").select();
    return;
  }
  const hit = event.target.closest?.("article[data-id]");
  const isArrow = event.key === "ArrowDown" || event.key === "ArrowUp";
  if (isArrow && !event.target.matches("select") && hits().length) {
    const all = hits();
    const place = hit ? all.indexOf(hit) + (event.key === "ArrowDown" ? 1 : -1) : event.key === "ArrowDown" ? 0 : -1;
    event.preventDefault();
    if (place < 0) $("#q").focus();
    else all[Math.min(place, all.length - 1)].focus();
  } else if (hit && event.target === hit) {
    // Single keys work on a focused hit alone, so they are in nobody's way.
    if (event.key === "Enter") guarded(preview(hit));
    else if (event.key === "y") guarded(markHit($(".mark[data-relevant=true]", hit)));
    else if (event.key === "n") guarded(markHit($(".mark[data-relevant=false]", hit)));
    else if (event.key === "u") guarded(undo());
  }
});

window.addEventListener("popstate", () => guarded(show(location.pathname + location.search)));

async function unlock() {
  const fetched = await page(location.pathname + location.search);
  if ($("#unlock", fetched)) {
    sessionStorage.removeItem(KEY);
    if ($("#key").value) say("The key is wrong. Ask who runs the server for it.");
    return;
  }
  $("#unlock").remove();
  await show(location.pathname + location.search);
}

if ($("#unlock")) {
  if (sessionStorage.getItem(KEY)) guarded(unlock());
} else {
  enhance();
}
