// The page is what the server renders. An event says that something changed: what the page shows
// is fetched again, and what differs is put in its place.
"use strict";

const { events, fragment } = document.body.dataset;
const shown = document.getElementById("orders");
const state = document.getElementById("state");

function connect() {
  const source = new EventSource(events);
  source.onopen = () => { say("live", "Live"); refresh(); };  // What was missed is fetched.
  source.onmessage = refresh;
  source.addEventListener("gap", refresh);
  source.onerror = () => {
    say("waiting", "Reconnecting");
    // The browser tries again by itself, unless something in between gave it an error page.
    if (source.readyState === EventSource.CLOSED) setTimeout(connect, 2000);
  };
}

function say(name, text) {
  state.dataset.state = name;
  state.querySelector(".text").textContent = text;
}

// However many events there are, one fetch is under way and one more follows.
let fetching = false;
let again = false;

async function refresh() {
  if (fetching) { again = true; return; }
  fetching = true;
  try {
    do {
      again = false;
      const response = await fetch(fragment, { cache: "no-store" });
      if (!response.ok) throw new Error(response.statusText);
      const template = document.createElement("template");
      template.innerHTML = await response.text();
      show(template.content);
      say("live", "Live");
    } while (again);
  } catch {
    say("waiting", "Reconnecting");
    setTimeout(refresh, 2000);
  } finally {
    fetching = false;
  }
}

function show(next) {
  for (const figure of next.querySelectorAll("dd")) {
    const old = shown.querySelector(`dd[data-key="${figure.dataset.key}"]`);
    if (old.textContent !== figure.textContent) {
      old.textContent = figure.textContent;
      mark(old, "changed");
    }
  }
  shown.querySelector(".more").replaceWith(next.querySelector(".more"));
  const body = shown.querySelector("tbody");
  const rows = [...next.querySelectorAll("tbody tr")];
  const wanted = new Set(rows.map((row) => row.dataset.key));
  const present = new Map();
  for (const row of [...body.rows]) {
    if (wanted.has(row.dataset.key)) present.set(row.dataset.key, row);
    else row.remove();
  }
  let place = body.firstElementChild;
  for (const row of rows) {
    const before = present.get(row.dataset.key);
    if (!before) {
      body.insertBefore(row, place);
      mark(row, "added");
      continue;
    }
    if (before === place) place = place.nextElementSibling;
    else body.insertBefore(before, place);
    if (before.innerHTML !== row.innerHTML) {
      before.innerHTML = row.innerHTML;
      mark(before, "changed");
    }
  }
}

function mark(element, name) {
  element.classList.remove("added", "changed");
  void element.offsetWidth;  // So that the animation begins anew.
  element.classList.add(name);
}

document.addEventListener("animationend", ({ target }) => {
  target.classList.remove("added", "changed");
});

document.addEventListener("click", ({ target }) => {
  if (target.dataset.post) fetch(target.dataset.post, { method: "POST" });
});

document.getElementById("place").addEventListener("submit", async (submitted) => {
  submitted.preventDefault();
  const form = submitted.target;
  const response = await fetch(form.action, { method: "POST", body: new FormData(form) });
  if (response.ok) form.reset();
});

connect();
