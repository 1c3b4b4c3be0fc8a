"use strict";
(() => {
  const element = document.getElementById("data");
  if (!element) return;
  const data = JSON.parse(element.textContent);

  // What colour a value has; `heat.py` says the same for the page as it loads.
  const shade = (kind, value, experts) => {
    if (kind === "load") {
      if (value < data.dead_below / experts) return ["dead", 1];
      const distance = Math.log2(value * experts) / 2;
      return [distance > 0 ? "high" : "low", Math.min(Math.abs(distance), 1)];
    }
    if (kind === "cosine") return [value > 0 ? "high" : "low", Math.min(Math.abs(value), 1)];
    return ["high", Math.min((value * experts) / 3, 1)];
  };
  const short = (value) => value.toFixed(2).replace(/^(-?)0\./, "$1.");
  const percent = (value) => (value * 100).toFixed(1) + " %";
  const paint = (cell, kind, value, experts) => {
    const [name, opacity] = value === undefined ? ["none", 0] : shade(kind, value, experts);
    cell.setAttribute("class", "cell " + name);
    cell.setAttribute("fill-opacity", opacity);
  };

  for (const select of document.querySelectorAll("select[data-for]")) {
    const key = select.dataset.for;
    const picture = document.querySelector(`svg[data-matrix="${key}"]`);
    const cells = picture.querySelectorAll(".cell");
    const numbers = picture.querySelectorAll(".in-cell");
    const { lines = [], values, columns } = data.matrices[key];
    const rowsOf = (at) => (at < lines.length ? data.loads.rows.slice(0, -1).map((step) => step[lines[at]]) : values[at - lines.length]);
    select.addEventListener("change", () => {
      const rows = rowsOf(select.selectedIndex);
      cells.forEach((cell, index) => {
        const row = rows[Math.floor(index / columns)] || [];
        const value = row[index % columns];
        paint(cell, picture.dataset.kind, value, row.length);
        numbers[index].textContent = value === undefined ? "" : short(value);
      });
      picture.setAttribute("aria-label", picture.getAttribute("aria-label").split(" — ")[0] + " — " + select.value);
    });
  }

  const slider = document.getElementById("step");
  if (slider) {
    const cells = [...document.querySelectorAll("svg[data-small] .cell")];
    const said = document.getElementById("step-said");
    const show = () => {
      const rows = data.loads.rows[slider.value];
      let at = 0;
      rows.forEach((row, line) => {
        for (let index = 0; index < data.loads.experts[line]; index++, at++) {
          paint(cells[at], "load", row[index], row.length);
          const title = cells[at].firstChild;
          title.textContent = title.textContent.replace(/: .*$/, ": " + (row[index] === undefined ? "not run" : percent(row[index])));
        }
      });
      said.textContent = data.loads.names[slider.value];
      slider.setAttribute("aria-valuetext", data.loads.names[slider.value]);
    };
    slider.addEventListener("input", show);
  }

  const text = document.getElementById("tokens");
  if (text) {
    const tokens = [...text.querySelectorAll(".token")];
    const panel = document.getElementById("token-panel");
    const select = document.getElementById("token-group");
    const look = (expert) => `e${expert % 8}` + (expert >= 16 ? " more" : expert >= 8 ? " again" : "");
    let chosen = 0;
    const weights = (index) => data.tokens.weights[select.selectedIndex][index];
    const make = (name, content, look) => {
      const made = document.createElement(name);
      if (content) made.textContent = content;
      if (look) made.className = look;
      return made;
    };
    const tell = (index) => {
      chosen = index;
      tokens.forEach((token, at) => {
        token.tabIndex = at === index ? 0 : -1;
        token.setAttribute("aria-pressed", at === index);
      });
      const bars = make("div", "", "weights");
      const most = Math.max(...weights(index)) || 1;
      weights(index).forEach((weight, expert) => {
        const line = make("div");
        const bar = make("i", "", look(expert));
        bar.style.setProperty("--w", weight / most);
        line.append(make("span", "expert " + expert), bar, make("b", (weight * 100).toFixed(0) + " %"));
        bars.append(line);
      });
      panel.replaceChildren(make("p", `Token ${index + 1} of ${tokens.length}: “${data.tokens.pieces[index]}”, ${select.value}`), bars);
    };
    const colour = () => tokens.forEach((token, index) => {
      const own = weights(index);
      const order = own.map((_, expert) => expert).sort((first, second) => own[second] - own[first]);
      token.className = "token " + look(order[0]);
      token.querySelector("sup").textContent = order[0];
      token.title = order.slice(0, 3).map((expert) => `expert ${expert}: ${percent(own[expert])}`).join(", ");
    });
    tokens.forEach((token, index) => {
      for (const event of ["pointerenter", "focus", "click"]) token.addEventListener(event, () => tell(index));
    });
    text.addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      const to = event.key === "Home" ? 0 : event.key === "End" ? tokens.length - 1 : move ? chosen + move : -1;
      if (tokens[to]) {
        event.preventDefault();
        tokens[to].focus();
      }
    });
    select.addEventListener("change", () => { colour(); tell(chosen); });
    tell(0);
  }
})();
