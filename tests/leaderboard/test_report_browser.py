"""The page in a real browser, from a file: what a reader does with mouse, keyboard and phone.

Needs chromium, chromedriver and selenium; `make browser` installs the first two where it may.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("selenium", reason="the page's tests need the package selenium")
pytest.importorskip("scipy")

from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.wait import WebDriverWait

from kvzip_press.leaderboard.analysis.references import Judgement
from kvzip_press.leaderboard.pictures.canvas import luminance as relative_luminance
from kvzip_press.leaderboard.report import write_report
from kvzip_press.leaderboard.rows.head_budgets import HeadBudgets
from kvzip_press.leaderboard.rows.results import Row

pytestmark = pytest.mark.browser

MakeRow = Callable[..., Row]
MakeTable = Callable[..., list[Row]]
MakeHeads = Callable[..., list[HeadBudgets]]
Open = Callable[..., "Page"]
CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
PATIENCE = 600  # seconds after which something is taken never to come; only a test that fails waits so long
STORED = "try { window.storedAtBegin = localStorage.getItem('kvzip-press-theme'); } catch { /* no page of ours */ }"
COUNTING = """
window.work = { elements: 0, items: 0, layouts: 0 };
(() => {
  const counts = (owner, names, field, add) => names.split(" ").forEach((name) => {
    const found = Object.getOwnPropertyDescriptor(owner.prototype, name);
    const original = found[field];
    found[field] = function (...given) { add(this); return original.apply(this, given); };
    Object.defineProperty(owner.prototype, name, found);
  });
  const made = () => { work.elements += 1; };
  const gone = (array) => { work.items += array.length; };
  const laid = () => { work.layouts += 1; };
  counts(Document, "createElement createElementNS", "value", made);
  counts(Array, "concat every filter find findIndex findLast flatMap forEach includes indexOf", "value", gone);
  counts(Array, "join map reduce slice some sort toSorted", "value", gone);
  counts(Element, "getBoundingClientRect getClientRects", "value", laid);
  counts(Element, "clientWidth clientHeight scrollWidth scrollHeight", "get", laid);
  counts(HTMLElement, "offsetWidth offsetHeight", "get", laid);
})();
"""
HOSTILE = "</script><script>window.boom=1</script><img src=x onerror='window.boom=1'>"


class Page:
    """A page that is open."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def run(self, script: str, *values: object) -> Any:
        return self.driver.execute_script(script, *values)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)  # type: ignore[no-any-return]

    def one(self, selector: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def column(self, place: int) -> list[str]:
        """The texts of a column of the results."""
        selector = f"#results tbody td:nth-child({place})"
        return self.run("return [...document.querySelectorAll(arguments[0])].map((cell) => cell.innerText)", selector)  # type: ignore[no-any-return]

    def choose(self, select: str, text: str) -> None:
        Select(self.one(f"#{select}")).select_by_visible_text(text)

    def wait(self, condition: Callable[[], object]) -> None:
        WebDriverWait(self.driver, PATIENCE, poll_frequency=0.05).until(lambda _: condition())

    def settle(self) -> None:
        """Awaits a whole frame: in the first one after a change of sizes, the page is told of it and draws curves."""
        self.driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")

    def point_at(self, element: Any) -> None:
        """Moves the pointer to an element and awaits that the page was told, which a browser does in a later frame."""
        self.settle()
        listens = "document.addEventListener('pointermove', (event) => { window.pointedAt = event.target; })"
        self.run(f"if (!('pointedAt' in window)) {listens}; window.pointedAt = null;")
        ActionChains(self.driver).move_to_element(element).perform()
        self.wait(lambda: self.run("return arguments[0].contains(window.pointedAt)", element))

    def open_question(self) -> None:
        """Opens the first question and awaits its answers: a browser tells the page of it some time after the click."""
        self.one("#example-list summary").click()
        self.wait(lambda: self.run("return document.querySelector('.answers').children.length"))

    def read_again(self, theme: str | None, store: Callable[[], object]) -> None:
        """Reads the page again as one who had chosen this theme.

        The storage is the browser's and not the page's: what was stored just before a page is read again, the next page
        may see a moment later or, on a busy machine, never. So it is stored and read until the page has found it there
        when it began; a page that does not store it never does.
        """

        def read() -> bool:
            store()
            self.driver.refresh()
            return bool(self.run("return window.storedAtBegin") == theme)

        self.wait(read)

    def choose_theme(self, theme: str) -> None:
        """Clicks on the switch until the page has this theme."""
        for _ in range(3):
            if self.one("html").get_attribute("data-theme") != theme:
                self.one("#theme").click()

    def work(self, script: str) -> dict[str, int]:
        """What the page does in a script: elements made, items of arrays gone through, layouts asked for."""
        self.run("for (const name in work) work[name] = 0;")
        self.run(script)
        return self.run("return work")  # type: ignore[no-any-return]

    def colour(self, selector: str, name: str) -> str:
        return self.run("return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]", selector, name)  # type: ignore[no-any-return]

    def reads(self, selector: str) -> str:
        return self.one(selector).text  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if CHROMIUM is None or CHROMEDRIVER is None:
        pytest.skip("the page's tests need chromium and chromedriver (make browser)")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER))
    started.set_script_timeout(PATIENCE)
    started.set_page_load_timeout(PATIENCE)
    started.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": STORED})
    yield started
    started.quit()


@pytest.fixture
def open_page(driver: Any, tmp_path: Path) -> Iterator[Open]:
    """Opens the page of some rows; at the end its console must be empty and it must have asked nothing of a network."""

    def open_rows(
        rows: list[Row],
        heads: Sequence[HeadBudgets] = (),
        *,
        width: int = 1280,
        scheme: str = "light",
        **options: str,
    ) -> Page:
        write_report(rows, heads, tmp_path / "page.html", **options)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        corner = ActionBuilder(driver)  # where nothing is, wherever a test before left the pointer
        corner.pointer_action.move_to_location(0, 0)
        corner.perform()
        driver.get((tmp_path / "page.html").as_uri())
        page = Page(driver)
        page.read_again(None, lambda: page.run("localStorage.clear()"))
        page.settle()
        return page

    for log in ("browser", "performance"):
        driver.get_log(log)
    yield open_rows
    assert driver.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    schemes = {url.split(":")[0] for url in asked}
    assert "file" in schemes and schemes <= {"file", "data", "chrome"}  # the last is the browser's own first tab


@pytest.fixture
def _counting(driver: Any) -> Iterator[None]:
    """Pages that are opened count their work: how long it takes says more of the machine than of the page."""
    added = driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": COUNTING})
    yield
    driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)


@pytest.fixture
def page(open_page: Open, make_table: MakeTable, make_heads: MakeHeads) -> Page:
    """A page with two models; the first has rows of both kinds."""
    rows = (
        make_table() + make_table(4, query_aware=True) + make_table(4, model="bigger", run_id="other", tasks=("gsm8k",))
    )
    return open_page(rows, make_heads(), title="A title", command="kvzip-press leaderboard run --grid quick")


def test_the_page_shows_every_part(page: Page) -> None:
    assert page.driver.title == page.reads("h1") == "A title"
    assert len(page.column(1)) == 10
    for part in (
        "#by-bytes svg",
        "#by-time svg",
        "#task-map table",
        "#areas-bars .bars",
        "#areas-bytes-bars .bars",
        "#head-map table",
        "#needle-map table",
    ):
        assert page.one(part).is_displayed(), part
    assert len(page.all("#by-bytes .point")) == 10
    assert "kvzip-press leaderboard run --grid quick" in page.reads("#footer")
    assert "torch 2" in page.reads("#footer").replace("\n", " ")
    assert len(page.all("#example-list details")) > 5


def test_a_click_on_a_column_sorts_by_it_and_another_turns_the_order(page: Page) -> None:
    page.all("#results thead button")[2].click()
    scores = [float(text.split()[0]) for text in page.column(3)]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) > 3
    assert page.all("#results th")[2].get_attribute("aria-sort") == "descending"
    page.all("#results thead button")[2].send_keys(Keys.ENTER)
    assert [float(text.split()[0]) for text in page.column(3)] == scores[::-1]
    page.all("#results thead button")[0].click()
    assert page.column(1) == sorted(page.column(1), key=str.lower)
    assert [head.get_attribute("aria-sort") for head in page.all("#results th")].count(None) == 9


def test_what_was_not_measured_is_last_in_either_order(open_page: Open, make_row: MakeRow) -> None:
    page = open_page(
        [make_row(press="a", prefill_seconds=None), make_row(press="b"), make_row(press="c", prefill_seconds=9.0)]
    )
    for expected in (["9.00", "1.50", "–"], ["1.50", "9.00", "–"]):
        page.all("#results thead button")[6].click()
        assert page.column(7) == expected


def test_filters_choose_ratio_task_and_press(page: Page) -> None:
    page.choose("ratio", "0.75 removed")
    assert page.column(2) == ["0", "0.75", "0.75", "0.75"]  # the full cache stays for comparison
    before = page.column(3)
    page.choose("task", "profile_qa")
    assert page.column(3) != before
    assert not page.one("#needles").is_displayed()  # this task knows no depths
    page.one("#presses button:nth-child(2)").click()
    assert page.column(1) == ["full cache", "SnapKV", "random"]
    assert page.run("return document.activeElement.innerText") == "KVzip"
    assert len(page.all("#by-bytes .point")) == 3
    page.one("#presses button:nth-child(2)").click()
    page.choose("ratio", "all")
    assert len(page.column(1)) == 10


def test_query_aware_rows_and_other_models_are_shown_apart(page: Page) -> None:
    agnostic = page.column(3)
    assert "query-agnostic" in page.reads("#about")
    page.one("#aware").send_keys(Keys.SPACE)
    assert page.one("#aware").get_attribute("aria-checked") == "true"
    assert "query-aware" in page.reads("#about") and page.column(3) != agnostic
    page.choose("model", "bigger")
    assert "bigger" in page.reads("#about")
    assert not page.one("#aware").is_enabled()
    assert not page.one("#heads").is_displayed()  # that run has none
    page.choose("model", "tiny")
    assert page.one("#heads").is_displayed()


def luminance(colour: str) -> float:
    return sum(float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3])


def test_the_dark_page_follows_the_system_and_the_switch(open_page: Open, make_table: MakeTable) -> None:
    for scheme, dark in (("light", False), ("dark", True)):
        page = open_page(make_table(1), scheme=scheme)
        assert (luminance(page.colour("body", "backgroundColor")) < 100) is dark
        assert (luminance(page.colour("body", "color")) > 600) is dark
    for expected, dark in (("light", False), ("dark", True)):
        page.one("#theme").click()
        assert page.one("html").get_attribute("data-theme") == expected
        assert (luminance(page.colour("body", "backgroundColor")) < 100) is dark
    page.read_again("dark", lambda: page.choose_theme("dark"))
    assert page.one("html").get_attribute("data-theme") == "dark"
    page.one("#theme").click()
    assert page.one("html").get_attribute("data-theme") == "auto"


@pytest.mark.parametrize("width", [320, 375])
def test_on_a_phone_nothing_is_wider_than_the_screen(
    width: int, open_page: Open, make_table: MakeTable, make_heads: MakeHeads
) -> None:
    tasks = (*(f"a_task_with_quite_a_long_name_{i}" for i in range(12)), "niah")
    rows = make_table(2, tasks=tasks, model="an-organisation/a-model-with-a-very-long-name-indeed-70B-instruct")
    page = open_page(rows, make_heads(), width=width, title="Averyveryverylongwordinatitle of a page")
    assert page.run("return [innerWidth, document.documentElement.scrollWidth]") == [width, width]
    assert page.one("#head-map table").is_displayed()
    page.open_question()
    assert page.run("return document.documentElement.scrollWidth") == width


def test_hovering_tells_the_figures_and_leaving_hides_them(page: Page) -> None:
    point = page.all("#by-bytes .point")[1]
    page.point_at(point)
    tip = page.one("#tip")
    assert tip.is_displayed()
    for part in ("KVzip, 0.5 removed", "accuracy 0.", "32 questions on 16 contexts", "10.5 MB", "to full cache, p"):
        assert part in tip.text
    assert point.get_attribute("aria-label").startswith("KVzip, 0.5 removed, accuracy")
    page.point_at(page.one("h1"))
    assert not tip.is_displayed()
    page.point_at(page.one("#head-map td"))
    assert tip.text == "layer 1, KV head 0\nkept 0.500\nmean of 2 contexts"
    page.point_at(page.one("#needle-map tbody tr:nth-child(3) td"))
    assert tip.text.startswith("depth 20 to 30 %, about 50")


def test_arrow_keys_walk_through_a_map_which_is_one_stop_of_the_tab_key(page: Page) -> None:
    cells = page.all("#task-map td")
    assert [cell.get_attribute("tabindex") for cell in cells].count("0") == 1
    page.run("arguments[0].focus()", cells[0])
    cells[0].send_keys(Keys.ARROW_RIGHT)
    assert page.driver.switch_to.active_element == cells[1]
    cells[1].send_keys(Keys.ARROW_DOWN)  # three columns: two tasks and their mean
    assert page.driver.switch_to.active_element == cells[4]
    assert page.one("#tip").is_displayed()
    assert page.reads("#tip").startswith("profile_qa\nKVzip")
    cells[4].send_keys(Keys.ESCAPE)
    assert not page.one("#tip").is_displayed()


def test_a_saturated_ratio_is_pointed_out(open_page: Open, make_row: MakeRow, make_table: MakeTable) -> None:
    assert not open_page(make_table()).one("#ties").is_displayed()
    rows = [make_row(press=press, sample_id=str(i)) for press in ("a", "b") for i in range(9)]
    rows += [make_row(press=press, compression_ratio=0.9, score=score) for press, score in (("a", 0.94), ("b", 0.12))]
    equal, few = open_page(rows).reads("#ties").splitlines()
    assert equal == "At 0.7 removed nothing tells the presses apart: all have an accuracy of 1.00 on 9 contexts."
    assert few.startswith("At 0.9 removed 1 context cannot tell the presses apart: accuracies from 0.12 to 0.94 may be")


def test_times_are_charted_only_where_they_differ(open_page: Open, make_table: MakeTable) -> None:
    page = open_page(make_table(2))
    assert page.one("#times").is_displayed() and not page.one("#no-times").is_displayed()
    rows = [replace(row, answer_seconds=0.2 + 0.01 * (place % 7)) for place, row in enumerate(make_table(2))]
    page = open_page(rows)
    assert not page.one("#times").is_displayed()
    assert "do not differ beyond their spread" in page.reads("#no-times")


def test_answers_show_the_question_and_right_and_wrong_by_sign_and_colour(open_page: Open, make_row: MakeRow) -> None:
    scores = {"a": 1.0, "b": 0.0, "c": 0.5}
    page = open_page([make_row(press=press, score=score, question="Who?") for press, score in scores.items()])
    assert page.reads("#example-list summary").splitlines()[0] == "Who?"
    page.open_question()
    found = page.all(".answers .score")
    assert [answer.text for answer in found] == ["✓ 1.00", "✗ 0.00", "◐ 0.50"]
    assert [answer.get_attribute("title") for answer in found] == ["right", "wrong", "partly"]
    assert len({answer.value_of_css_property("color") for answer in found}) == 3


def test_a_single_length_is_a_map_of_presses_by_depth_and_a_single_task_one_by_ratio(
    open_page: Open, make_table: MakeTable
) -> None:
    rows = [row for row in make_table(4, tasks=("niah",)) if row.n_context_tokens and row.n_context_tokens < 600]
    page = open_page(rows)
    heads = [cell.text for cell in page.all("#needle-map thead th")]
    assert heads == ["depth, %", *(f"{10 * tenth}–{10 * tenth + 10}" for tenth in range(10))]
    presses = ["full cache", "KVzip", "SnapKV", "random"]
    assert [cell.text for cell in page.all("#needle-map tbody th")] == presses
    assert page.one("#needle-cell option").text == "niah: 0.5 removed"
    assert page.reads("#tasks-title") == "Every ratio"
    assert [cell.text for cell in page.all("#task-map thead th")][1:] == [
        "0.5 removed",
        "0.75 removed",
        "0.9375 removed",
    ]
    page.choose("ratio", "0.75 removed")
    assert not page.one("#tasks").is_displayed()
    assert [cell.text for cell in page.all("#needle-map tbody th")] == presses


def test_budgets_say_their_range(page: Page) -> None:
    assert page.reads("#areas-title") == "Mean accuracy over kept fractions from 0.06 to 1.00"
    assert "(to" not in page.reads("#areas-bytes-bars") and "In brackets" not in page.reads("#areas-bytes-note")


def test_an_area_says_where_its_press_was_measured_last(open_page: Open, make_row: MakeRow) -> None:
    points = [("full cache", 0.0, 16), ("a", 0.0, 16), ("a", 0.75, 4), ("a, int4", 0.0, 4), ("a, int4", 0.75, 1)]
    rows = [make_row(press=press, compression_ratio=ratio, resident_bytes=n * 10**6) for press, ratio, n in points]
    page = open_page(rows)
    assert page.reads("#areas-bytes-bars").count("(to 4.00 MB)") == 1
    assert "In brackets: where a press was measured last" in page.reads("#areas-bytes-note")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_numbers_of_a_map_are_readable_on_their_ground(scheme: str, open_page: Open, make_row: MakeRow) -> None:
    rows = [make_row(press=f"{place:03}", task=task, score=place / 100) for place in range(101) for task in "ab"]
    page = open_page(rows, scheme=scheme)
    pairs = page.run(
        """const pen = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
        const rgb = (colour) => {
          pen.fillStyle = colour;
          pen.fillRect(0, 0, 1, 1);
          return [...pen.getImageData(0, 0, 1, 1).data];
        };
        return [...document.querySelectorAll("#task-map td:nth-child(2)")].map((cell) => getComputedStyle(cell))
          .map((style) => [rgb(style.color), rgb(style.backgroundColor)]);"""
    )
    assert len(pairs) == 101
    assert min(contrast(*pair) for pair in pairs) >= 4.5


def contrast(one: Sequence[int], other: Sequence[int]) -> float:
    low, high = sorted(relative_luminance([part / 255 for part in colour]) + 0.05 for colour in (one, other))
    return high / low


def test_names_of_presses_do_not_break_on_a_phone(open_page: Open, make_table: MakeTable) -> None:
    rows = [
        replace(row, press={"SnapKV": "adakv_expected_attention"}.get(row.press, row.press)) for row in make_table(4)
    ]
    page = open_page(rows, width=390)
    for selector in ("#results .name", "#area-bars .name", "#task-map tbody th", "#needle-map tbody th"):
        sizes = page.run(
            """return [...document.querySelectorAll(arguments[0])].filter((name) => !/\\d %|–/.test(name.textContent))
              .map((name) => [name.textContent, name.getClientRects().length, name.scrollWidth - name.clientWidth,
                              name.clientHeight]);""",
            selector,
        )
        heights = {text: height for text, _, _, height in sizes}
        assert all(cut <= 0 for _, _, cut, _ in sizes), (selector, sizes)
        assert len(set(heights.values())) <= 1, (selector, heights)  # a broken one would be twice as high
    assert page.run("return document.documentElement.scrollWidth") == 390


def test_what_models_say_is_shown_and_never_run(open_page: Open, make_row: MakeRow) -> None:
    words = {
        "press": HOSTILE,
        "task": HOSTILE,
        "model": HOSTILE,
        "question_id": HOSTILE,
        "provenance": {HOSTILE: HOSTILE},
    }
    page = open_page([make_row(prediction=HOSTILE, references=(HOSTILE,), **words)], title=HOSTILE, command=HOSTILE)
    page.open_question()
    assert HOSTILE in page.reads(".answers") and HOSTILE in page.reads("#footer") and page.reads("h1") == HOSTILE
    assert page.all("img") == [] and page.run("return window.boom ?? null") is None
    page.point_at(page.one("#by-bytes .point"))
    assert HOSTILE in page.reads("#tip")


def test_an_empty_page_says_so_and_one_row_is_a_whole_page(open_page: Open, make_row: MakeRow) -> None:
    page = open_page([])
    assert page.one("#empty").is_displayed() and not page.one("#main").is_displayed()
    page = open_page([make_row()])
    assert not page.one("#empty").is_displayed()
    assert (page.column(1), page.column(3)) == (["KVzip"], ["1.00"])
    assert len(page.all("#by-bytes .point")) == 1
    labels = [text.text for text in page.all("#by-bytes text")]
    assert len([label for label in labels if label.replace(".", "").isdigit()]) >= 6 + 2, labels  # both axes
    assert "it takes two caches that were timed on two contexts" in page.reads("#no-times")
    assert page.reads("#marks") == "± standard error, clustered by context."
    parts = ("areas", "heads", "needles", "times", "tasks")  # the last would be a map of one column
    assert [name for name in parts if page.one(f"#{name}").is_displayed()] == []


@pytest.mark.usefixtures("_counting")
def test_ten_thousand_rows_are_drawn_with_the_work_of_a_few(open_page: Open, make_table: MakeTable) -> None:
    """The page draws cells, which are as many, and goes through no rows."""
    found = []
    for n_contexts, n_rows in ((2, 320), (63, 10_080)):
        rows = make_table(n_contexts, n_questions=4, tasks=("niah", "b", "c", "d"))
        assert len(rows) == n_rows
        page = open_page(rows)
        at_first = page.run("return work")
        changed = page.work("document.querySelector('#presses button:nth-child(2)').click()")
        assert len(page.column(1)) == 7
        found.append((at_first, changed))
    for few, many in zip(*found, strict=True):
        assert 500 < many["elements"] == few["elements"] < 1000
        assert 0 < many["layouts"] == few["layouts"] < 10
        assert 2000 < many["items"] < 1.1 * few["items"]


@pytest.mark.usefixtures("_counting")
def test_five_hundred_presses_each_at_ratios_of_its_own_are_usable(
    open_page: Open, make_row: MakeRow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is measured is the page's program, so the statistics, which take minutes for so many, are left out."""
    monkeypatch.setattr("kvzip_press.leaderboard.report.data.judge", lambda rows: Judgement("full cache", "press 1"))
    monkeypatch.setattr("kvzip_press.leaderboard.report.data.ties", lambda rows: [])
    rows = [
        make_row(press=press, compression_ratio=ratio, task=task, score=place / 500, tags={"depth": 0.5})
        for task in ("a", "b", "c", "d")
        for place, press in enumerate(["full cache", *(f"press {place}" for place in range(1, 501))])
        for ratio in ((0.25 + place / 2000, 0.5 + place / 4000, 0.75 + place / 4000) if place else (0.0,))
    ]
    page = open_page(rows)
    at_first = page.run("return work")
    assert len(page.all("#presses button")) == 501
    assert len(page.column(1)) == 1501
    without_one = page.work("document.querySelectorAll('#presses button')[7].click()")
    in_order = page.work("document.querySelectorAll('thead button')[1].click()")
    assert len(page.column(1)) == 1498
    page.choose("task-ratio", "0.26 removed")
    assert len(page.all("#task-map tbody tr")) == 500
    page.open_question()
    assert page.run("return document.querySelector('.answers').children.length") == 3 * 1498
    for work in (at_first, without_one, in_order):  # all grows with the lines: what is quadratic has thousands a line
        assert 30 < work["elements"] / 1501 < 50 and 150 < work["items"] / 1501 < 250, work
        assert 0 < work["layouts"] < 10, work


def test_models_are_a_filter_and_how_alike_they_rank_presses_is_stated(open_page: Open, make_table: MakeTable) -> None:
    rows = make_table(6) + make_table(6, model="org/bigger", run_id="other") + make_table(6, query_aware=True)
    page = open_page(rows)
    assert [option.text for option in page.all("#model option")] == ["tiny", "org/bigger"]
    heads = [cell.text for cell in page.all("#correlation-table thead th")]
    assert heads == ["other model", "mean", "95 %", "0.5 removed", "0.75 removed", "0.9375 removed"]
    cells = [cell.text for cell in page.all("#correlation-table tbody tr > *")]
    assert cells[:2] == ["org/bigger", "+1.00"] and "to +1.00" in cells[2]
    assert all(text == "+1.00 (3)" for text in cells[3:])
    assert "(of this pair: 12 and 12)" in page.reads("#correlation-note")
    page.choose("model", "org/bigger")
    assert page.all("#correlation-table tbody th")[0].text == "tiny"
    page.choose("model", "tiny")
    page.one("#aware").click()  # the other model has no such rows
    assert not page.one("#correlations").is_displayed()


def test_a_difference_that_is_rounded_to_0_has_no_minus(open_page: Open, make_row: MakeRow) -> None:
    cells = [("full cache", 0.0, 1.0), ("KVzip", 0.5, 0.996), ("KVzip", 0.75, 0.99)]
    rows = [
        make_row(press=press, compression_ratio=ratio, sample_id=str(i), score=score)
        for press, ratio, score in cells
        for i in range(2)
    ]
    labels = {point.get_attribute("aria-label") for point in open_page(rows).all("#by-bytes .point")}
    for ratio, said in (("0.5", "+0.00"), ("0.75", "−0.01")):
        assert any(label.startswith(f"KVzip, {ratio} removed") and f"{said} [" in label for label in labels), labels


def test_one_model_has_no_correlation(open_page: Open, make_table: MakeTable) -> None:
    assert not open_page(make_table(2) + make_table(2, run_id="again")).one("#correlations").is_displayed()


def test_what_the_contexts_could_show_stands_below_the_table(open_page: Open, make_table: MakeTable) -> None:
    fair = [
        replace(row, score={"full cache": float(int(row.sample_id) % 4 > 0), "random": 0.0}.get(row.press, row.score))
        for row in make_table()
    ]
    page = open_page(fair)
    assert "four of five repetitions is 0." in page.reads("#detectable")
    page.point_at(page.all("#by-bytes .point")[1])
    assert "could show 0." in page.reads("#tip")
    assert not page.one("#not-counting").is_displayed()
    easy = [replace(row, score=1.0) if row.press == "full cache" else row for row in fair]
    said = open_page(easy).reads("#not-counting")
    assert said.startswith("Tasks that cannot tell presses apart") and "at the ceiling" in said


def test_on_a_phone_a_table_of_models_scrolls_inside_its_card(open_page: Open, make_table: MakeTable) -> None:
    names = ("an-organisation/a-model-with-a-very-long-name-indeed-70B-instruct", "another-one/of-the-same-length-8B")
    page = open_page(
        [row for i, name in enumerate(names) for row in make_table(2, model=name, run_id=str(i))], width=320
    )
    assert page.one("#correlations").is_displayed()
    assert page.run("return document.documentElement.scrollWidth") == 320
