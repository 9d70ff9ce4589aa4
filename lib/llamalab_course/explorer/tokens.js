// Draws an answer's tokens, shaded by probability; a click on one offers its alternatives.
// Whatever a model says is set as plain text, never as HTML.

const percent = share => (100 * share).toFixed(1) + " %";

function render({ model, el }) {
  const answer = document.createElement("div");
  const choices = document.createElement("div");
  el.append(answer, choices);

  const offer = (token, place) => {
    choices.replaceChildren(`Instead of “${token.text}” (${percent(token.share)}): `);
    for (const other of token.top) {
      const button = document.createElement("button");
      button.className = "jupyter-button llamalab-choice";
      button.textContent = `${other.text} ${percent(other.share)}`;
      button.onclick = () => model.send({ place, id: other.id });
      choices.append(button);
    }
  };

  const drawn = (token, place) => {
    const span = document.createElement("span");
    span.className = "llamalab-answer " + token.band;
    span.textContent = token.text;
    span.tabIndex = 0;
    span.setAttribute("role", "button");
    span.title = [
      `${percent(token.share)}, ${token.band}`,
      ...token.top.map(other => `${other.text}  ${percent(other.share)}`),
    ].join("\n");
    span.onclick = () => offer(token, place);
    span.onkeydown = event => {
      if (event.key === "Enter" && !event.ctrlKey) span.onclick();
    };
    return span;
  };

  const draw = () => {
    choices.replaceChildren();
    answer.replaceChildren(...model.get("tokens").map(drawn));
  };
  model.on("change:tokens", draw);
  draw();
  return () => model.off("change:tokens", draw);
}

export default { render };
