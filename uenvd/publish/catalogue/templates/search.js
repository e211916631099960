"use strict";
(() => {
  const box = document.getElementById("search");
  if (box) {
    const query = document.getElementById("query");
    const found = document.getElementById("found");
    const systems = document.getElementById("systems");
    const cards = [...document.querySelectorAll(".card")].map((element) => ({
      element,
      match: element.querySelector(".match"),
      words: element.dataset.words,
      packages: element.dataset.packages.split("|").filter(Boolean),
      systems: element.dataset.systems.split(" "),
    }));
    const names = [...new Set(cards.flatMap((card) => card.systems))].sort();
    for (const name of names) {
      const label = document.createElement("label");
      const input = document.createElement("input");
      input.type = "checkbox";
      input.value = name;
      label.append(input, name);
      systems.append(label);
    }
    systems.hidden = names.length < 2;

    const update = () => {
      const words = query.value.toLowerCase().split(/\s+/).filter(Boolean);
      const chosen = [...systems.querySelectorAll("input:checked")].map((input) => input.value);
      let shown = 0;
      for (const card of cards) {
        const inside = [];
        const fits = words.every((word) => {
          const packages = card.packages.filter((one) => one.toLowerCase().includes(word));
          inside.push(...packages);
          return packages.length > 0 || card.words.includes(word);
        });
        const visible = fits && (chosen.length === 0 || chosen.some((name) => card.systems.includes(name)));
        card.element.hidden = !visible;
        shown += visible ? 1 : 0;
        const matching = [...new Set(inside)];
        card.match.hidden = matching.length === 0;
        card.match.textContent = matching.length === 0 ? "" :
          "contains " + matching.slice(0, 4).join(", ") + (matching.length > 4 ? ` and ${matching.length - 4} more` : "");
      }
      found.textContent = shown === cards.length ? `${shown} shown` :
        shown === 0 ? "Nothing is called so. Try fewer words." : `${shown} of ${cards.length} shown`;
    };
    query.addEventListener("input", () => {
      update();
      history.replaceState(null, "", query.value ? "#q=" + encodeURIComponent(query.value) : location.pathname + location.search);
    });
    systems.addEventListener("change", update);
    document.addEventListener("keydown", (event) => {
      if (event.key === "/" && document.activeElement !== query) {
        event.preventDefault();
        query.focus();
      } else if (event.key === "Escape" && document.activeElement === query && query.value) {
        query.value = "";
        query.dispatchEvent(new Event("input"));
      }
    });
    if (location.hash.startsWith("#q=")) {
      try {
        query.value = decodeURIComponent(location.hash.slice(3));
      } catch {
        query.value = "";
      }
    }
    box.hidden = false;
    update();
  }

  for (const block of document.querySelectorAll(".use pre")) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "Copy";
    button.setAttribute("aria-label", "Copy: " + block.getAttribute("aria-label"));
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(block.textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(block);
        button.textContent = "Selected";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    });
    block.parentElement.append(button);
  }
})();
