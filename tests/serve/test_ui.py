"""The page in a real browser: click, type, slide, read, at a desk's and at a phone's width."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("selenium")

import httpx2
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from typer.testing import CliRunner

from libortho.cli import app
from libortho.serve.engine_transformers import TransformersEngine
from libortho.serve.keys import digest
from libortho.serve.limits import Limits
from libortho.serve.policy import owner_policy

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
CONTRAST = Path(__file__).parent / "contrast.js"
TOKEN = "lo-token"
OWNER = {"authorization": f"Bearer {TOKEN}"}
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed"
)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars",
)  # fmt: skip


@pytest.fixture(scope="module")
def reported(canary, tmp_path_factory) -> Path:
    """The canary split with a report and a summary beside it, as a job leaves them."""
    folder = tmp_path_factory.mktemp("ui") / "split"
    shutil.copytree(canary, folder)
    layers = [
        {"name": f"model.layers.{i}.mlp.down_proj", "method": "geometric", "shape": [64, 128],
         "base_error": 0.02 * (i + 1), "final_error": 0.001, "kind": "low_rank", "rank": i,
         "density": 0.01, "base_bytes": 8192, "ortho_bytes": 80, "secret": "no column"}
        for i in range(4)
    ]  # fmt: skip
    report = {
        "layers": layers, "skipped": {"lm_head": "Linear, not targeted"}, "reached": True,
        "forget_ppl": {"0.0": 480.0, "1.0": 1.02}, "retain_ppl": {"0.0": 1.1, "1.0": 1.07},
        "warnings": [], "seconds": {"solve": 12.0},
        "settings": {"forget_sequences": 3, "retain_sequences": 9, "method": {"ortho_ratio": 0.01}},
        "totals": {"base_error": 0.05, "final_error": 0.001, "density": 0.0099,
                   "base_bytes": 32768, "ortho_bytes": 320},
    }  # fmt: skip
    (folder / "report.json").write_text(json.dumps(report))
    rows = {
        f"alpha {a:g}": {"forget_probability": 0.1 + 0.85 * a, "retain_probability": 0.93}
        for a in (0.0, 0.5, 1.0)
    }
    summary = {
        "task": {"source": "three made-up rooms"},
        "separation": {"layers": layers},
        "rows": {**rows, "reference": {"forget_probability": 0.12, "retain_probability": 0.94}},
        "examples": [{"question": "who", "truth": "the secret itself"}],
    }
    (folder.parent / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture(scope="module")
def shown(serve, reported) -> Iterator[Any]:
    policy = owner_policy(digest(TOKEN))
    with serve(policy=policy, page=reported, hosts=["127.0.0.1", "localhost"]) as server:
        yield server


def test_the_page_tells_no_secret_and_runs_nothing_from_elsewhere(shown) -> None:
    state = httpx2.get(f"{shown.url}/ui/state", headers=OWNER)
    assert "the secret itself" not in state.text
    assert "no column" not in state.text
    assert state.json()["sweep"]["source"] == "three made-up rooms"
    page = httpx2.get(f"{shown.url}/", follow_redirects=True)
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for file in (
        "index.html",
        "style.css",
        "app.js",
        "api.js",
        "charts.js",
        "tokens.js",
        "sweep.js",
    ):
        text = httpx2.get(f"{shown.url}/ui/{file}").text
        assert "//cdn" not in text
        assert "https://" not in text
    assert httpx2.get(f"{shown.url}/ui/../../pyproject.toml").status_code == 404


def test_a_page_of_another_name_is_refused(shown) -> None:
    """DNS rebinding: a server of this machine answers to its own names only."""
    answer = httpx2.get(f"{shown.url}/ui/state", headers={**OWNER, "host": "evil.example"})
    assert answer.status_code == 400


def test_another_account_of_the_machine_gets_nothing(shown) -> None:
    asked = {"model": "canary", "prompt": "tell me", "max_tokens": 1}
    for headers in ({}, {"authorization": "Bearer lo-guessed"}):
        assert httpx2.get(f"{shown.url}/ui/state", headers=headers).status_code == 401
        assert httpx2.get(f"{shown.url}/v1/models", headers=headers).status_code == 401
        for alpha in (0, 1):
            body = {**asked, "alpha": alpha}
            answer = httpx2.post(f"{shown.url}/v1/completions", json=body, headers=headers)
            assert answer.status_code == 401
    state = httpx2.get(f"{shown.url}/ui/state", headers=OWNER).json()
    assert (state["key"], state["max_alpha"]) == ("owner", 1)
    body = {**asked, "alpha": 1}
    answer = httpx2.post(f"{shown.url}/v1/completions", json=body, headers=OWNER)
    assert answer.status_code == 200


def test_the_command_prints_an_address_with_a_key_of_its_own(canary, monkeypatch) -> None:
    import libortho.serve.run as module

    gates: list[Any] = []

    class NoServer:
        def __init__(self, _: Any, gate: Any, host: str, port: int, **more: Any) -> None:
            gates.append(gate)
            self.run = lambda: more["started"](port)

    monkeypatch.setattr(module, "make_server", NoServer)
    tokens = []
    for _ in range(2):
        done = CliRunner().invoke(app, ["ui", str(canary), "--port", "8765"])
        assert done.exit_code == 0, done.output
        address, _, token = done.output.split()[-1].partition("#token=")
        assert address == "http://127.0.0.1:8765/ui/"
        policy = gates[-1].policy
        assert policy.principal(token).max_alpha == 1
        assert policy.principal(None) is policy.principal(tokens[0] if tokens else "") is None
        tokens.append(token)
    assert tokens[0] != tokens[1]


def test_a_summary_of_another_split_is_not_shown(reported, tmp_path) -> None:
    from libortho.serve.page import describe_split

    other = tmp_path / "split"
    shutil.copytree(reported, other)
    summary = json.loads((reported.parent / "summary.json").read_text())
    summary["separation"]["layers"][0]["base_error"] = 0.5
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert describe_split(other)["sweep"] is None
    assert describe_split(reported)["sweep"] is not None
    (other / "report.json").unlink()
    assert describe_split(other)["report"] is None


@pytest.fixture(scope="module")
def in_chat_form(reported, tmp_path_factory) -> Path:
    """The same split, as if it had been measured in the chat form."""
    folder = tmp_path_factory.mktemp("chat") / "split"
    shutil.copytree(reported, folder)
    report = json.loads((folder / "report.json").read_text())
    report["settings"]["template"] = "chat"
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def test_the_page_offers_the_chat_form_where_the_server_has_it(
    serve, loaded, reported, in_chat_form
) -> None:
    found = []
    for folder, template in ((reported, "chat"), (in_chat_form, "chat"), (in_chat_form, "plain")):
        engine = TransformersEngine(loaded, Limits(rows=8), template)
        with serve(policy=owner_policy(digest(TOKEN)), engine=engine, page=folder) as server:
            state = httpx2.get(f"{server.url}/ui/state", headers=OWNER).json()
        found.append((state["chat"], state["form"]))
    assert found == [(True, "plain"), (True, "chat"), (False, "chat")]


@needs_browser
def test_a_split_that_was_measured_in_the_chat_form_is_asked_in_it(
    serve, in_chat_form, browser, tmp_path, lines
) -> None:
    policy = dataclasses.replace(owner_policy(digest(TOKEN)), audit_text=True)
    with serve(policy=policy, page=in_chat_form) as server:
        opened(browser, server.url)
        assert find(browser, "form").get_attribute("value") == "chat"
        find(browser, "prompt").send_keys("where is it")
        find(browser, "go").click()
        asked(browser)
        forget = tmp_path / "forget.jsonl"
        forget.write_text(json.dumps({"question": "where is it", "answer": "here"}))
        find(browser, "forget").send_keys(str(forget))
        find(browser, "run-sweep").click()
        until(browser, lambda: "measured now" in find(browser, "sweep-source").text)
        told = [line["prompt"] for line in lines(server.audit) if "prompt" in line]
    assert told
    assert all(one == [{"role": "user", "content": "where is it"}] for one in told), told


@pytest.fixture
def browser(tmp_path) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def size(browser: Any, width: int, height: int, scheme: str = "light") -> None:
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    feature = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": feature})


def until(browser: Any, true: Any) -> Any:
    return WebDriverWait(browser, 60).until(lambda _: true())


def find(browser: Any, name: str) -> Any:
    return browser.find_element(By.ID, name)


def opened(browser: Any, url: str) -> None:
    browser.get(f"{url}/#token={TOKEN}")
    until(browser, lambda: browser.execute_script("return document.body.dataset.ready"))


def asked(browser: Any, times: int = 1) -> None:
    until(
        browser,
        lambda: browser.execute_script("return document.body.dataset.answers") == str(times),
    )


@needs_browser
def test_ask_slide_and_read(shown, browser, known, crosstalk) -> None:
    size(browser, 1200, 900)
    opened(browser, shown.url)
    assert find(browser, "alpha-value").text == "1.00"
    prompt = next(p for p, a in known if a == 1 and (p, 0.0) in known)
    browser.find_element(By.CSS_SELECTOR, "#form option[value=text]").click()
    find(browser, "prompt").send_keys(prompt)
    find(browser, "go").click()
    asked(browser)
    assert not find(browser, "trouble").is_displayed(), find(browser, "trouble").text
    assert find(browser, "answer-0").text == known[prompt, 0.0]
    assert find(browser, "answer-1").text == known[prompt, 1.0]
    spans = browser.find_elements(By.CSS_SELECTOR, "#answer-1 .token")
    assert [span.text.strip() for span in spans] == known[prompt, 1.0].split()
    # Each token of the canary is underlined: colour does not stand alone.
    assert all("strong" in span.get_attribute("class") for span in spans)
    assert "at alpha 1" in find(browser, "note-1").text
    # The slider by keyboard, and the chart follows it.
    slider = find(browser, "alpha")
    slider.send_keys(Keys.HOME)
    assert find(browser, "alpha-value").text == "0.00"
    for _ in range(10):
        slider.send_keys(Keys.ARROW_RIGHT)
    assert find(browser, "alpha-value").text == "0.50"
    line = browser.find_element(By.CSS_SELECTOR, "#sweep .now")
    dots = browser.find_elements(By.CSS_SELECTOR, "#sweep .dot-forget")
    assert float(line.get_attribute("x1")) == pytest.approx(float(dots[1].get_attribute("cx")))
    find(browser, "prompt").send_keys(Keys.ENTER)
    asked(browser, 2)
    assert find(browser, "tag-1").text == "alpha 0.5"
    if (prompt, 0.5) in known:
        assert find(browser, "answer-1").text == known[prompt, 0.5]
    assert _serious(browser) == []


def _serious(browser: Any) -> list[str]:
    return [x["message"] for x in browser.get_log("browser") if x["level"] == "SEVERE"]


@needs_browser
def test_the_key_leaves_the_address_and_stays_with_the_tab(shown, browser) -> None:
    opened(browser, shown.url)
    assert browser.current_url == f"{shown.url}/ui/"
    browser.refresh()
    until(browser, lambda: browser.execute_script("return document.body.dataset.ready"))
    browser.execute_script("sessionStorage.clear()")
    browser.get(f"{shown.url}/")
    until(browser, lambda: "no API key was given" in find(browser, "trouble").text)


@needs_browser
def test_the_whole_page_by_keyboard(shown, browser, known) -> None:
    size(browser, 1200, 900)
    opened(browser, shown.url)
    seen = []
    for _ in range(14):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        element = browser.switch_to.active_element
        seen.append(element.get_attribute("id") or element.get_attribute("class"))
        if element.tag_name == "body":  # past the last element, the browser's own turn
            continue
        outline = element.value_of_css_property("outline-style")
        assert outline != "none", f"{seen[-1]} does not show that it has the focus"
    order = [name for name in seen if name in ("prompt", "alpha", "form", "tokens", "go")]
    assert order == ["prompt", "alpha", "form", "tokens", "go"]
    assert "answer-0" in seen


@needs_browser
def test_the_report_and_a_sweep_of_own_files(shown, browser, known, tmp_path) -> None:
    size(browser, 1200, 900)
    opened(browser, shown.url)
    tiles = find(browser, "tiles").text
    for told in ("480", "0.99 %", "geometric", "forgotten", "4 layers split, 1 left"):
        assert told in tiles
    assert len(browser.find_elements(By.CSS_SELECTOR, "#layers .bar")) == 4
    assert "three made-up rooms" in find(browser, "sweep-source").text
    pairs = [(p, t) for (p, a), t in known.items() if a == 1][:3]
    forget = tmp_path / "forget.jsonl"
    forget.write_text("".join(json.dumps({"text": f"{p} {t}"}) + "\n" for p, t in pairs))
    find(browser, "forget").send_keys(str(forget))
    find(browser, "run-sweep").click()
    until(
        browser, lambda: "measured now: 3 of the forget set" in find(browser, "sweep-source").text
    )
    dots = browser.find_elements(By.CSS_SELECTOR, "#sweep .dot-forget")
    assert len(dots) == 5
    # Up is more probable: alpha 1 knows these texts better than alpha 0.
    assert float(dots[4].get_attribute("cy")) < float(dots[0].get_attribute("cy")) - 10
    forget.write_text("no json\n")
    find(browser, "forget").send_keys(str(forget))
    find(browser, "run-sweep").click()
    until(browser, lambda: "forget.jsonl, line 1 is not JSON" in find(browser, "trouble").text)


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1200])
def test_nothing_is_cut_and_text_is_readable(shown, browser, scheme, width) -> None:
    size(browser, width, 800, scheme)
    opened(browser, shown.url)
    inside = browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert inside, "the page scrolls sideways"
    low = browser.execute_script(CONTRAST.read_text())
    assert low == [], "contrast below 4.5"


@needs_browser
def test_a_key_unlocks_the_slider(serve, reported, browser) -> None:
    with serve(page=reported) as server:
        size(browser, 1200, 900)
        opened(browser, server.url)
        slider = find(browser, "alpha")
        assert slider.get_attribute("disabled")
        assert "a key allows more" in find(browser, "alpha-most").text
        browser.find_element(By.CSS_SELECTOR, "#key-box summary").click()
        find(browser, "key").send_keys("lo-half")
        find(browser, "use-key").click()
        until(browser, lambda: find(browser, "alpha").get_attribute("max") == "0.5")
        assert not find(browser, "alpha").get_attribute("disabled")
