"""The web page in a headless browser."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import WebDriverWait

from mpillm.store import report, report_page
from mpillm.store.directory import Directory
from tests.conftest import clean_environment
from tests.job_helpers import CHAT
from tests.serve.serving import serving
from tests.store.test_report import made

KEY = "a key"
# What a page would do something with if it took texts for HTML.
HTML = "<img src=x onerror=hacked=1>"
ANSWER = f"{HTML}<script>hacked=1</script><a href='javascript:hacked=1'>a</a> [b](javascript:hacked=1) **c**"
DRIVER = shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(
    DRIVER is None, reason="there is no chromedriver (apt install chromium-driver)"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(CHAT, folder / HTML)
    env = clean_environment(MPILLM_API_KEY=KEY)
    with serving(folder, [sys.executable], env, model=folder / HTML) as (url, _):
        yield url


@pytest.fixture(params=[(1280, "light"), (400, "dark")], ids=["desk", "phone"])
def browser(request: pytest.FixtureRequest, server: str, tmp_path: Path) -> Iterator[WebDriver]:
    width, scheme = request.param
    options = webdriver.ChromeOptions()
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(word)
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        sizes = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        driver.get(server)
        yield driver
    finally:
        driver.quit()


def look(browser: WebDriver, name: str) -> None:
    """A picture for people who ask for it; the page must never be wider than the screen."""
    if folder := os.environ.get("MPILLM_TEST_PICTURES"):
        browser.save_screenshot(f"{folder}/{name}-{browser.execute_script('return innerWidth')}.png")
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")


def too_faint(browser: WebDriver) -> list[str]:
    """What has a contrast below 4.5:1 (WCAG 2 AA) of what is written on the page and can be seen."""
    return list(
        browser.execute_script(
            """
            const paint = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
            function over(color, below, opacity) {  // the RGB of a colour over another one
                paint.globalAlpha = 1; paint.fillStyle = `rgb(${below})`; paint.fillRect(0, 0, 1, 1);
                paint.globalAlpha = opacity; paint.fillStyle = color; paint.fillRect(0, 0, 1, 1);
                return [...paint.getImageData(0, 0, 1, 1).data.slice(0, 3)];
            }
            function behind(element) {
                const dark = matchMedia("(prefers-color-scheme: dark)").matches;
                const parent = element.parentElement, canvas = dark ? [18, 18, 18] : [255, 255, 255];
                return over(getComputedStyle(element).backgroundColor, parent ? behind(parent) : canvas, 1);
            }
            function opacity(element) {
                return element ? getComputedStyle(element).opacity * opacity(element.parentElement) : 1;
            }
            const linear = (part) => part <= 10.31475 ? part / 3294.6 : ((part / 255 + .055) / 1.055) ** 2.4;
            const light = ([r, g, b]) => .2126 * linear(r) + .7152 * linear(g) + .0722 * linear(b);
            const found = [];
            for (const element of document.querySelectorAll("body *")) {
                const own = [...element.childNodes].map((one) => one.data ?? "").join("").trim();
                const text = element.value || own;
                if (!text || element.disabled || !element.checkVisibility()) continue;
                const below = behind(element);
                const above = over(getComputedStyle(element).color, below, opacity(element));
                const [low, high] = [light(below), light(above)].sort((one, other) => one - other);
                const ratio = (high + .05) / (low + .05);
                if (ratio < 4.5) found.push(`${text}: ${ratio.toFixed(2)}`);
            }
            return found;
            """
        )
    )


def test_chat_and_batches(browser: WebDriver, server: str, tmp_path: Path) -> None:
    # The page may replace an element between the moment that it is found and the one that it is used.
    wait = WebDriverWait(browser, 60, ignored_exceptions=[StaleElementReferenceException])

    def find(selector: str) -> str:
        return str(
            browser.execute_script("return document.querySelector(arguments[0])?.innerText ?? ''", selector)
        )

    def press(selector: str) -> None:
        wait.until(lambda _: browser.find_element(By.CSS_SELECTOR, selector).click() is None)

    def write(selector: str, text: str) -> None:
        element = browser.find_element(By.CSS_SELECTOR, selector)
        element.clear()
        element.send_keys(text)

    wait.until(lambda _: find("#model") == HTML)
    focused = browser.execute_script("return document.activeElement.id")
    assert focused == ("text" if browser.execute_script("return innerWidth") > 500 else ""), (
        "phones have a keyboard"
    )
    # Without the key a sentence says so.
    write("#text", "the fox")
    press("#send")
    wait.until(lambda _: browser.find_elements(By.CSS_SELECTOR, ".message.error"))
    assert find(".message.error") == "The API key is missing or wrong. Type it under Settings."
    assert browser.find_element(By.ID, "text").get_property("value") == "the fox", (
        "it need not be typed again"
    )
    press("[data-view=settings]")
    write("#key", KEY + Keys.TAB)
    wait.until(lambda _: find("#name") == HTML)
    # An answer takes half of the context unless one says less.
    press("[data-view=chat]")
    press("#reset")
    write("#text", "the fox")
    press("#send")
    wait.until(
        lambda _: not browser.find_element(By.ID, "stop").is_displayed() and find(".message.assistant")
    )
    assert not browser.find_elements(By.CSS_SELECTOR, ".message.error")
    press("[data-view=settings]")
    write("#temperature", "0")
    write("#tokens", "12")
    look(browser, "settings")
    assert too_faint(browser) == []
    press("[data-view=chat]")
    press("#reset")

    with openai.OpenAI(base_url=f"{server}/v1", api_key=KEY) as client:
        history: list[dict[str, str]] = []
        for turn, text in enumerate(("the fox", "over the dog")):
            history.append({"role": "user", "content": text})
            made = client.chat.completions.create(model=HTML, messages=history, max_tokens=12, temperature=0)  # type: ignore[call-overload]
            write("#text", text)
            press("#send")
            wait.until(
                lambda _, turn=turn: (
                    len(browser.find_elements(By.CSS_SELECTOR, ".message.assistant")) == turn + 1
                    and not browser.find_element(By.ID, "stop").is_displayed()
                )
            )
            shown = browser.find_elements(By.CSS_SELECTOR, ".message.assistant")[turn]
            assert shown.get_property("textContent") == made.choices[0].message.content
            history.append({"role": "assistant", "content": made.choices[0].message.content})
    look(browser, "chat")

    # Texts are shown as they are, whoever wrote them.
    press("#reset")
    browser.execute_script(
        """
        const [fetched, choice] = [window.fetch, arguments[0]];
        window.fetch = (url, how) => fetched(url, url.endsWith("completions")
            ? { ...how, body: JSON.stringify({ ...JSON.parse(how.body), guided_choice: [choice], max_tokens: 300 }) }
            : how);
        """,
        ANSWER,
    )
    write("#text", ANSWER)
    press("#send")
    wait.until(
        lambda _: (
            [
                shown.get_property("textContent")
                for shown in browser.find_elements(By.CSS_SELECTOR, ".message")[-2:]
            ]
            == [ANSWER, ANSWER]
        )
    )
    assert too_faint(browser) == []

    name = f"{HTML} of {browser.execute_script('return innerWidth')}.jsonl"
    source = tmp_path / name
    lines = [{"prompt": "the fox"}, {"prompt": "a"}, {"prompt": 3.5}]
    source.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    press("[data-view=batches]")
    browser.find_element(By.ID, "file").send_keys(str(source))
    press("#upload button")
    # The newest comes first.
    wait.until(lambda _: name in find("#list") and "completed" in find("#list tr"))
    assert "3 of 3, 1 failed" in find("#list tr")
    source.write_text("\n")
    browser.find_element(By.ID, "file").send_keys(str(source))
    press("#upload button")
    wait.until(lambda _: f"failed: The input {name} contains no requests." in find("#list tr"))
    look(browser, "batches")
    if browser.execute_script("return innerWidth") < 500:  # what went wrong has the whole width
        wide = "const [cell] = document.querySelectorAll('#list td:nth-child(2)'); return cell.offsetWidth"
        assert browser.execute_script(wide) > 300
    assert too_faint(browser) == []
    assert browser.execute_script("return document.querySelectorAll('img, main script, main a').length") == 0
    assert browser.execute_script("return window.hacked === undefined")
    # A button keeps the focus when the page asks again.
    browser.execute_script(
        """
        document.querySelector("#list button").focus();
        window.asked = performance.getEntriesByType("resource").length;
        """
    )
    wait.until(
        lambda _: browser.execute_script("return performance.getEntriesByType('resource').length > asked + 3")
    )
    assert browser.execute_script("return document.activeElement.textContent") == "Answers"
    press("#list td:last-child button")
    wait.until(lambda _: list(tmp_path.glob("batch-*_output.jsonl")))
    # A keyboard goes on from there where a button is no more.
    source.write_text('{"prompt": "the fox", "max_tokens": 500, "ignore_eos": true}\n' * 3000)
    browser.find_element(By.ID, "file").send_keys(str(source))
    press("#upload button")
    wait.until(lambda _: " left" in find("#list tr"))
    look(browser, "running")
    browser.execute_script("document.querySelector('#list button').focus()")
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    wait.until(lambda _: "cancelled" in find("#list tr"))
    assert browser.execute_script("return document.activeElement.textContent") in ("Answers", "Batches")
    (download,) = tmp_path.glob("batch-*_output.jsonl")
    wait.until(lambda _: len(download.read_text().splitlines()) == 2)
    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert all("401" in entry["message"] for entry in errors), errors


def test_code_and_a_server_that_goes(browser: WebDriver) -> None:
    """Code stands in a block that scrolls; a lost connection is said in words, and what has come stays."""
    wait = WebDriverWait(browser, 60)
    text = f"see **this**:\n```html\n{HTML}  # {'x' * 300}\n  b\n```\nand `that`"
    event = json.dumps({"choices": [{"delta": {"content": text}}]})
    browser.execute_script(
        """
        const bytes = new TextEncoder().encode(`data: ${arguments[0]}\\n\\n`);
        let pulls = 0;
        async function pull(stream) {  // the cut comes when what came before it is on the page
            if (!pulls++) return stream.enqueue(bytes);
            window.busy = document.getElementById("messages").ariaBusy;
            await new Promise((done) => setTimeout(done, 300));
            stream.error(new TypeError("network error"));
        }
        const answers = [new Response(new ReadableStream({ pull }, { highWaterMark: 0 }))];
        window.fetch = async (url, how) => {
            if (!url.endsWith("completions")) return new Response('{"data": [{"id": "m", "max_model_len": 9}]}');
            if (answers.length) return answers.pop();
            throw new TypeError("Failed to fetch");
        };
        """,
        event,
    )
    for count, said in enumerate(
        ("The connection to the server ended before the answer did.", "The server does not answer."), 1
    ):
        browser.find_element(By.ID, "text").send_keys("a" + Keys.ENTER)
        wait.until(
            lambda _, count=count: len(browser.find_elements(By.CSS_SELECTOR, ".message.error")) == count
        )
        assert browser.find_elements(By.CSS_SELECTOR, ".message.error")[-1].text == said
        assert browser.find_element(By.ID, "send").is_enabled()
    busy = browser.execute_script("return [busy, document.getElementById('messages').ariaBusy]")
    assert busy == ["true", "false"], "a screen reader waits for the whole answer"
    (answer,) = browser.find_elements(By.CSS_SELECTOR, ".message.assistant")
    shown = f"see **this**:\n{HTML}  # {'x' * 300}\n  b\nand `that`"
    assert answer.get_property("textContent") == shown
    (code,) = answer.find_elements(By.TAG_NAME, "pre")
    assert code.get_property("scrollWidth") > code.get_property("clientWidth")
    assert browser.find_element(By.ID, "text").get_property("value") == "a", "it need not be typed again"
    assert too_faint(browser) == []
    look(browser, "code")


def test_a_report_with_long_names(browser: WebDriver, tmp_path: Path) -> None:
    """Its tables fit the page: on a phone each row of a wide one is a card with the names of its columns."""
    run = made()
    run.errors = {"x" * 300: f"Line 1: {'y' * 300} is no number."}
    run.ranks *= 32
    report.write(Directory(tmp_path), run)
    path, _ = report_page.write_html(tmp_path)
    browser.get(path.as_uri())
    look(browser, "report")
    wide = "return [...document.querySelectorAll('table')].some(one => one.scrollWidth > one.clientWidth + 1)"
    assert not browser.execute_script(wide)
    phone = browser.execute_script("return matchMedia('(prefers-color-scheme: dark)').matches")
    cell = "getComputedStyle(document.querySelector('.wide td:last-child'), '::before').content"
    assert browser.execute_script(f"return {cell}") == ('"used at most"' if phone else "none")
    # Each word of at most 16 letters is whole: it has one rectangle.
    broken = """
        const found = [], range = document.createRange();
        for (const cell of document.querySelectorAll("th, td")) {
            if (!cell.firstChild) continue;
            for (const word of cell.firstChild.data.matchAll(/\\S{1,16}(?!\\S)(?<!\\S{17})/g)) {
                range.setStart(cell.firstChild, word.index);
                range.setEnd(cell.firstChild, word.index + word[0].length);
                if (range.getClientRects().length > 1) found.push(word[0]);
            }
        }
        return found;"""
    assert browser.execute_script(broken) == []
