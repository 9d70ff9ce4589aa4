"""The two widgets that ipywidgets lacks: keys, and tokens to click on."""

from __future__ import annotations

import anywidget
import traitlets


class Keys(anywidget.AnyWidget):
    """Tells of Ctrl+Enter and Esc pressed inside the explorer."""

    _esm = """
    function render({ model, el }) {
      const pressed = event => {
        const inside = event.target.closest && event.target.closest(".llamalab-explorer");
        const key = event.key === "Escape" ? "stop"
          : event.key === "Enter" && (event.ctrlKey || event.metaKey) ? "generate" : null;
        if (!inside || !key || !inside.contains(el)) return;
        event.preventDefault();
        event.stopImmediatePropagation();
        model.send({ key });
      };
      window.addEventListener("keydown", pressed, true);
      return () => window.removeEventListener("keydown", pressed, true);
    }
    export default { render };
    """


class Tokens(anywidget.AnyWidget):
    """An answer's tokens, shaded by probability; a click shows alternatives to branch to.

    `tokens` holds for each {text, share, band, top: [{id, text, share}]}. Choosing an alternative
    sends {place, id}.
    """

    tokens = traitlets.List().tag(sync=True)
    _esm = """
    const percent = share => (100 * share).toFixed(1) + " %";
    function render({ model, el }) {
      const answer = document.createElement("div"), choices = document.createElement("div");
      el.append(answer, choices);
      const choose = (token, place) => {
        choices.replaceChildren(`Instead of “${token.text}” (${percent(token.share)}): `);
        for (const other of token.top) {
          const button = document.createElement("button");
          button.className = "jupyter-button llamalab-choice";
          button.textContent = `${other.text} ${percent(other.share)}`;
          button.onclick = () => model.send({ place, id: other.id });
          choices.append(button);
        }
      };
      const draw = () => {
        choices.replaceChildren();
        answer.replaceChildren(...model.get("tokens").map((token, place) => {
          const span = document.createElement("span");
          span.className = "llamalab-answer " + token.band;
          span.textContent = token.text;
          span.tabIndex = 0;
          span.setAttribute("role", "button");
          span.title = [`${percent(token.share)}, ${token.band}`,
            ...token.top.map(t => `${t.text}  ${percent(t.share)}`)].join("\\n");
          span.onclick = () => choose(token, place);
          span.onkeydown = event => { if (event.key === "Enter" && !event.ctrlKey) span.onclick(); };
          return span;
        }));
      };
      model.on("change:tokens", draw);
      draw();
      return () => model.off("change:tokens", draw);
    }
    export default { render };
    """
