// A few questions with every press's answer.
const SIGN = { right: "✓", partly: "◐", wrong: "✗" };
const verdict = (score) => (score >= 1 ? "right" : score > 0 ? "partly" : "wrong");

function drawExamples({ table, shown, task, ratio }) {
  const chosen = table.examples.filter((example) => task === null || example.task === task);
  byId("examples").hidden = !chosen.length;
  const answersOf = (example) => example.answers
    .filter(([press, removed]) => shown.has(press) && (ratio === null || removed === ratio || removed === 0))
    .flatMap(([press, removed, score, answer]) => [
      el("span", {}, `${press} ${asRatio(removed)}`),
      el("span", { class: `score ${verdict(score)}`, title: verdict(score) }, `${SIGN[verdict(score)]} ${asScore(score)}`),
      el("span", {}, answer || "(nothing)"),
    ]);
  byId("example-list").replaceChildren(...chosen.map((example) => {
    const answers = el("div", { class: "answers" });
    const question = el("details", {},
      el("summary", {}, example.question || `${example.task}, ${example.question_id}`,
        el("small", {}, `${example.task}, context ${example.sample_id}, ${example.question_id} · expected: ${example.references.join(" | ")}`)),
      answers);
    question.addEventListener("toggle", () => answers.replaceChildren(...(question.open ? answersOf(example) : []))); // hundreds of presses give it thousands of lines
    return question;
  }));
}
