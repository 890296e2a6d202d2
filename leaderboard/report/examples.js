// A few questions with every press's answer.
function drawExamples({ table, shown, task, ratio }) {
  const chosen = table.examples.filter((example) => task === null || example.task === task);
  byId("examples").hidden = !chosen.length;
  byId("example-list").replaceChildren(...chosen.map((example) => el("details", {},
    el("summary", {}, `${example.task}, context ${example.sample_id}, ${example.question_id} `, el("small", {}, `expected: ${example.references.join(" | ")}`)),
    el("div", { class: "answers" }, ...example.answers
      .filter(([press, removed]) => shown.has(press) && (ratio === null || removed === ratio || removed === 0))
      .flatMap(([press, removed, score, answer]) => [
        el("span", {}, `${press} ${asRatio(removed)}`),
        el("span", { class: "score" }, asScore(score)),
        el("span", {}, answer || "(nothing)"),
      ])),
  )));
}
