// SPDX-License-Identifier: Apache-2.0
// Sortable tables and the sample viewer. The state is kept in the URL's fragment, so that it can be
// linked to: sort=TABLE.COLUMN.ascending, sample=ID, cell=NUMBER. Data is only ever inserted as text.
"use strict";
(() => {
  const state = new URLSearchParams(location.hash.includes("=") ? location.hash.slice(1) : "");
  const remember = (name, value) => {
    state.set(name, value);
    try { history.replaceState(null, "", "#" + state); } catch { /* some browsers refuse this for files */ }
  };

  // ---- tables ----
  const order = (table, column, direction) => {
    const body = table.tBodies[0];
    const sign = direction === "ascending" ? 1 : -1;
    const key = (row) => row.cells[column].dataset.sort;
    const numeric = table.tHead.rows[0].cells[column].classList.contains("number");
    const rows = [...body.rows];
    rows.sort((a, b) => {
      const x = key(a), y = key(b);
      // Rows without a value stay last in either direction.
      if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
      return sign * (numeric ? x - y : x.localeCompare(y, "en", { numeric: true }));
    });
    body.append(...rows);
    for (const cell of table.tHead.rows[0].cells) cell.setAttribute("aria-sort", "none");
    table.tHead.rows[0].cells[column].setAttribute("aria-sort", direction);
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    [...table.tHead.rows[0].cells].forEach((cell, column) => {
      cell.querySelector("button").addEventListener("click", () => {
        const down = cell.getAttribute("aria-sort") === "ascending" ||
          (cell.getAttribute("aria-sort") === "none" && cell.classList.contains("number"));
        const direction = down ? "descending" : "ascending";
        order(table, column, direction);
        remember("sort", `${table.id}.${column}.${direction}`);
      });
    });
  }
  const asked = /^([\w-]+)\.(\d+)\.(ascending|descending)$/.exec(state.get("sort") || "");
  const sorted = asked && document.getElementById(asked[1]);
  if (sorted && sorted.matches("table.sortable") && sorted.tHead.rows[0].cells[asked[2]]) {
    const cell = sorted.tHead.rows[0].cells[asked[2]];
    cell.setAttribute("aria-sort", asked[3] === "ascending" ? "descending" : "ascending");
    cell.querySelector("button").click(); // in the opposite direction
  }

  // ---- samples ----
  const holder = document.getElementById("data");
  if (!holder) return;
  const data = JSON.parse(holder.textContent);
  const at = (id) => document.getElementById(id);
  const make = (name, text, parent, kind) => {
    const made = document.createElement(name);
    made.textContent = text;
    if (kind) made.className = kind;
    parent.append(made);
    return made;
  };
  const draw = (name, attributes) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    at("picture").append(made);
  };
  const verdict = (score) =>
    score === 1 ? ["\u2713 right", "good"] : score === 0 ? ["\u2717 wrong", "bad"]
      : score === null ? ["not scored", ""] : [`score ${Number(score.toFixed(3))}`, ""];

  const drawTokens = (stage, grid, width, height) => {
    const [rows, columns] = grid;
    const on = (r, c) => r >= 0 && c >= 0 && r < rows && c < columns &&
      (parseInt(stage.bits[(r * columns + c) >> 2], 16) >> (3 - ((r * columns + c) & 3))) & 1;
    const w = width / columns, h = height / rows;
    let dark = "", border = "";
    for (let r = 0; r <= rows; r++) {
      for (let c = 0; c <= columns; c++) {
        const x = (c * w).toFixed(2), y = (r * h).toFixed(2);
        if (r < rows && c < columns && !on(r, c)) {
          dark += `M${x} ${y}h${(w + 0.05).toFixed(2)}v${(h + 0.05).toFixed(2)}h${(-w - 0.05).toFixed(2)}z`;
        }
        if (!on(r, c) !== !on(r - 1, c)) border += `M${x} ${y}h${w.toFixed(2)}`;
        if (!on(r, c) !== !on(r, c - 1)) border += `M${x} ${y}v${h.toFixed(2)}`;
      }
    }
    draw("path", { d: dark, class: "dropped" });
    draw("path", { d: border, class: "border" });
  };

  let now = { sample: 0, cell: 0, stage: null };
  // Indices of the samples that pass the filters.
  let listed = [];
  const pickType = at("pick-type"), onlyDiffering = at("only-differing");
  const list = () => {
    const type = pickType ? pickType.value : "";
    const fits = (sample) => (!type || sample.type === type) &&
      (!onlyDiffering.checked || sample.differs);
    listed = data.samples.map((_, i) => i).filter((i) => fits(data.samples[i]));
    const pick = at("pick-sample");
    pick.replaceChildren();
    for (const i of listed) {
      const sample = data.samples[i];
      const text = sample.question === null ? "" : ": " + sample.question;
      make("option", (sample.id + text).slice(0, 90), pick).value = i;
    }
    const none = listed.length === 0;
    if (none) make("option", "none of this type", pick);
    for (const name of ["pick-sample", "previous", "next"]) at(name).disabled = none;
  };
  const cellsOf = (sample) => data.cells.map((cell, i) => i).filter((i) => sample.cells[i]);
  const show = () => {
    const sample = data.samples[now.sample];
    const mine = cellsOf(sample);
    if (!mine.includes(now.cell)) now.cell = mine[mine.length - 1];
    const cell = data.cells[now.cell], said = sample.cells[now.cell];
    at("pick-sample").value = now.sample;
    const pick = at("pick-cell");
    pick.replaceChildren();
    for (const i of mine) make("option", data.cells[i].name, pick).value = i;
    pick.value = now.cell;

    const stages = said.stages || [];
    const chooser = at("pick-stage");
    chooser.replaceChildren();
    stages.forEach((stage, i) => { make("option", stage.name, chooser).value = i; });
    // By default the last stage with tokens: some methods drop all of them.
    const stage = stages.find((each) => each.name === now.stage) ||
      stages.findLast((each) => each.kept) || stages[0];
    if (stage) chooser.value = stages.indexOf(stage);
    at("stage-label").hidden = stages.length < 2;

    const picture = at("picture");
    picture.replaceChildren();
    picture.toggleAttribute("hidden", !sample.image);
    const caption = [];
    if (sample.image) {
      const [width, height] = sample.size;
      picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
      draw("image", { href: "data:image/jpeg;base64," + sample.image, width, height });
      if (stage) {
        drawTokens(stage, said.grid, width, height);
        caption.push(`${cell.name}, ${stage.name}: ${stage.kept} of ${said.grid[0] * said.grid[1]} tokens`);
      } else if (cell.blind) {
        caption.push("blind: the model saw a grey image instead");
      } else {
        caption.push(sample.note || "the kept tokens are unknown");
      }
    } else {
      caption.push(sample.note || "the picture is not available");
    }
    at("caption").textContent = caption.join(" ");

    const facts = at("facts");
    facts.replaceChildren();
    const fact = (name, value, kind) => { make("dt", name, facts); make("dd", value, facts, kind); };
    fact("question", sample.question === null ? "(not available)" : sample.question);
    fact("truth", sample.truth);
    fact("answer", said.answer);
    fact("result", ...verdict(said.score));
    if (sample.type) fact("type", sample.type);
    if (said.second !== null) fact("second pass", `answered "${said.second}", unlike the log: the tokens may differ from those of the run`);

    const body = at("all").tBodies[0];
    body.replaceChildren();
    for (const i of mine) {
      const row = make("tr", "", body);
      if (i === now.cell) row.setAttribute("aria-current", "true");
      const head = make("th", "", row);
      head.scope = "row";
      const button = make("button", data.cells[i].name, head);
      button.type = "button";
      button.addEventListener("click", () => choose({ cell: i }));
      make("td", sample.cells[i].answer, row);
      const [text, kind] = verdict(sample.cells[i].score);
      make("td", text, row, kind);
    }
  };
  const choose = (change) => {
    now = { ...now, ...change };
    show();
    remember("sample", data.samples[now.sample].id);
    remember("cell", now.cell);
  };
  const filter = () => {
    list();
    remember("type", pickType ? pickType.value : "");
    remember("differ", onlyDiffering.checked ? "1" : "");
    if (listed.length && !listed.includes(now.sample)) choose({ sample: listed[0] });
  };
  if (pickType) {
    for (const type of data.types) make("option", type, pickType).value = type;
    if (data.types.includes(state.get("type"))) pickType.value = state.get("type");
    pickType.addEventListener("change", filter);
  }
  onlyDiffering.checked = state.get("differ") === "1";
  onlyDiffering.addEventListener("change", filter);
  list();
  const number = (element) => Number(element.value);
  at("pick-sample").addEventListener("change", (event) => choose({ sample: number(event.target) }));
  at("pick-cell").addEventListener("change", (event) => choose({ cell: number(event.target) }));
  at("pick-stage").addEventListener("change", (event) => {
    choose({ stage: event.target.selectedOptions[0].textContent });
  });
  const step = (by) => {
    const count = listed.length;
    if (count) choose({ sample: listed[(listed.indexOf(now.sample) + by + count) % count] });
  };
  at("previous").addEventListener("click", () => step(-1));
  at("next").addEventListener("click", () => step(1));
  now.sample = Math.max(0, data.samples.findIndex((sample) => sample.id === state.get("sample")));
  now.cell = state.has("cell") && data.cells[state.get("cell")] ? Number(state.get("cell")) : data.first;
  if (listed.length && !listed.includes(now.sample)) now.sample = listed[0];
  show();
})();
