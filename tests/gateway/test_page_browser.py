"""The page in a real browser: chat, stop, jobs, workers, keys; nothing hostile becomes markup. Skipped without one.

Needs Chromium on the path and playwright, which is no dependency of the project: `pip install playwright`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import redis

from lamella import Client, Failed
from lamella.embedded import EmbeddedServer
from tests.client.acting_worker import MODEL, ActingWorker, done, token
from tests.gateway.conftest import MakeKey
from tests.gateway.running_gateway import AnsweringWorker, Events, RunningGateway, on_next_job
from tests.waiting import wait_until

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on the path"),
    pytest.mark.timeout(300),
]
HOSTILE = '<img src=x onerror="window.broken=1"><script>window.broken=1</script>'
WAIT_MS = 40_000


@pytest.fixture(scope="module")
def browser() -> Iterator[api.Browser]:
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Tab:
    """A page that remembers what went wrong in it, and every host that it spoke to."""

    def __init__(self, browser: api.Browser, width: int = 1000) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 800})
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT_MS)
        self.errors: list[str] = []
        self.hosts: set[str] = set()
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda said: self.errors.append(said.text) if "Security" in said.text else None)
        self.page.on("request", lambda request: self.hosts.add("/".join(request.url.split("/")[:3])))

    def open(self, gateway: RunningGateway, view: str = "chat") -> api.Page:
        self.page.goto(f"{gateway.url}/ui/#{view}")
        return self.page


@pytest.fixture
def tab(browser: api.Browser) -> Iterator[Tab]:
    tab = Tab(browser)
    yield tab
    tab.context.close()
    assert tab.errors == []


def ask(page: api.Page, text: str) -> None:
    page.wait_for_selector(f'#model option[value="{MODEL}"]', state="attached")
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def test_an_answer_streams_into_the_chat_and_the_dialogue_goes_on(
    gateway: RunningGateway, answering: AnsweringWorker, tab: Tab
) -> None:
    page = tab.open(gateway)

    ask(page, "Hi")
    api.expect(page.locator(".message.answer .said")).to_have_text("Hello there", timeout=WAIT_MS)
    api.expect(page.locator("#send")).to_be_visible(timeout=WAIT_MS)
    ask(page, "And more")
    api.expect(page.locator(".message.answer .said")).to_have_text(["Hello there"] * 2, timeout=WAIT_MS)

    assert answering.prompts == ["Hi", "And more"]
    assert "3 tokens" in page.locator(".message.answer .note").first.inner_text()
    assert tab.hosts == {gateway.url}


def test_stop_cancels_the_job_and_keeps_what_came(gateway: RunningGateway, worker: ActingWorker, tab: Tab) -> None:
    page = tab.open(gateway)
    started: list[str] = []

    def begin(job_id: str) -> None:
        worker.emit(job_id, token("Half "))
        started.append(job_id)

    thread = on_next_job(worker, begin)
    ask(page, "Hi")
    api.expect(page.locator(".message.answer .said")).to_have_text("Half", timeout=WAIT_MS)
    page.keyboard.press("Escape")
    thread.join(40)

    wait_until(lambda: worker.redis.hget(worker.keys.job(started[0]), "cancel") is not None)
    api.expect(page.locator(".message.answer .note")).to_contain_text("stopped", timeout=WAIT_MS)
    api.expect(page.locator("#send")).to_be_visible(timeout=WAIT_MS)


def test_an_error_is_told_and_can_be_tried_again(
    gateway: RunningGateway, embedded_redis: redis.Redis, tab: Tab
) -> None:
    answers: list[Events] = [(Failed(code="prompt_too_long", message="too long; shorten it"),), (token("Now"), done())]
    with AnsweringWorker(embedded_redis, lambda prompt: answers.pop(0)):
        page = tab.open(gateway)
        ask(page, "Hi")

        api.expect(page.locator(".message .error")).to_have_text("too long; shorten it", timeout=WAIT_MS)
        page.click("text=Try again")

        api.expect(page.locator(".message.answer .said")).to_have_text("Now", timeout=WAIT_MS)


@pytest.mark.parametrize(
    "answer",
    [
        HOSTILE,
        f"```html\n{HOSTILE}\n```",
        f"- {HOSTILE}\n\n# {HOSTILE}\n\n**{HOSTILE}** `{HOSTILE}`",
        f"[a](javascript:alert(1)) {HOSTILE}",
    ],
    ids=["plain", "fence", "list", "link"],
)
def test_a_hostile_answer_stays_text(
    gateway: RunningGateway, embedded_redis: redis.Redis, tab: Tab, answer: str
) -> None:
    with AnsweringWorker(embedded_redis, lambda prompt: (token(answer), done())):
        page = tab.open(gateway)
        ask(page, HOSTILE)

        api.expect(page.locator(".message.answer .said")).to_contain_text(HOSTILE, timeout=WAIT_MS)

    assert page.locator(".message.user .said").inner_text() == HOSTILE
    assert page.locator("#messages :is(img, script, a)").count() == 0
    assert page.evaluate("window.broken") is None


def test_markdown_becomes_lists_code_and_emphasis(
    gateway: RunningGateway, embedded_redis: redis.Redis, tab: Tab
) -> None:
    words = "# Title\n\nSome **bold** and `code`.\n\n1. one\n2. two\n   - below\n\n"
    text = f"{words}```python\nif a < b:\n    pass\n```\nafter"
    with AnsweringWorker(embedded_redis, lambda prompt: (token(text), done())):
        page = tab.open(gateway)
        ask(page, "Hi")
        api.expect(page.locator(".said")).to_contain_text(["Hi", "after"], timeout=WAIT_MS)

    said = page.locator(".message.answer .said")
    assert said.locator("pre").inner_text() == "if a < b:\n    pass"
    assert said.locator("ol > li").count() == 2
    assert said.locator("ol ul > li").inner_text() == "below"
    assert [said.locator(tag).inner_text() for tag in ("h3", "strong", "p code")] == ["Title", "bold", "code"]


def test_jobs_of_hostile_users_are_shown_opened_and_cancelled(
    gateway: RunningGateway, worker: ActingWorker, embedded_server: EmbeddedServer, tab: Tab
) -> None:
    with Client(embedded_server.url) as client:
        job = client.submit("Hi", model=MODEL, user=HOSTILE[:60])
        page = tab.open(gateway, "jobs")
        row = page.locator("#job-table tbody tr").first

        api.expect(row.locator(".user")).to_have_text(HOSTILE[:60], timeout=WAIT_MS)
        row.locator("[aria-expanded]").press("Enter")
        api.expect(page.locator("tr.detail")).to_contain_text(job.id, timeout=WAIT_MS)
        row.locator("text=Cancel").press("Enter")
        row.locator("text=Really cancel?").press("Enter")

        api.expect(row.locator(".state")).to_have_text("cancelled", timeout=WAIT_MS)
        assert client.status(job.id).state == "cancelled"
    assert page.evaluate("window.broken") is None
    assert page.locator("td img").count() == 0


def test_a_dead_job_is_retried(
    gateway: RunningGateway, worker: ActingWorker, embedded_server: EmbeddedServer, tab: Tab
) -> None:
    with Client(embedded_server.url) as client:
        job = client.submit("Hi", model=MODEL)
    worker.claim(job.id)
    worker.emit(job.id, Failed(code="attempts_exhausted", message="3 attempts were used up"))
    page = tab.open(gateway, "jobs")

    page.click("text=Retry")

    api.expect(page.locator("#job-table tbody tr")).to_have_count(2, timeout=WAIT_MS)
    api.expect(page.locator("#jobs-said")).to_contain_text("Goes on as job", timeout=WAIT_MS)


def test_workers_show_their_plan_and_their_speed(gateway: RunningGateway, worker: ActingWorker, tab: Tab) -> None:
    info = worker.announce().model_copy(update={"name": HOSTILE, "host": HOSTILE, "running": 1, "last_sweep_at": 100.0})
    worker.redis.zadd(worker.keys.workers, {HOSTILE: 1.0})

    def beat(sweeps: int) -> None:
        told = {
            "heartbeat_at": info.heartbeat_at + sweeps,
            "last_sweep_at": 100.0 + sweeps,
            "sweeps": sweeps,
            "tokens": 8 * sweeps,
            "tier_bytes": (2048 * sweeps, 1024 * sweeps, 1024 * sweeps),
        }
        worker.redis.set(worker.keys.worker(HOSTILE), info.model_copy(update=told).model_dump_json(), ex=600)

    beat(10)
    page = tab.open(gateway, "workers")
    card = page.locator(".worker").filter(has_text=HOSTILE)
    api.expect(card.locator(".tier-key")).to_have_text(
        "VRAM 1.0 KiB, 25 %RAM 1.0 KiB, 25 %disk 2.0 KiB, 50 %", timeout=WAIT_MS
    )
    beat(20)

    api.expect(card.locator('[data-key="Tokens/s"] dd')).to_have_text("8.00", timeout=WAIT_MS)
    api.expect(card.locator('[data-key="Sweep"] dd')).to_have_text("1.0 s", timeout=WAIT_MS)
    api.expect(page.locator("#plot-tokens .legend")).to_contain_text("8.00 tok/s", timeout=WAIT_MS)
    assert page.locator("#plot-tokens svg :is(path, circle)").count() >= 1
    assert page.evaluate("window.broken") is None


def test_a_key_is_asked_for_kept_in_the_tab_and_forgotten(
    guarded: RunningGateway, answering: AnsweringWorker, new_key: MakeKey, tab: Tab
) -> None:
    page = tab.open(guarded)

    page.fill("#key", "sk-lamella-wrong")
    page.press("#key", "Enter")
    api.expect(page.locator("#sign-in-error")).to_contain_text("not valid", timeout=WAIT_MS)
    page.fill("#key", new_key("ada"))
    page.press("#key", "Enter")
    api.expect(page.locator("#account-name")).to_have_text("ada", timeout=WAIT_MS)
    ask(page, "Hi")
    api.expect(page.locator(".message.answer .said")).to_have_text("Hello there", timeout=WAIT_MS)
    page.reload()
    api.expect(page.locator("#account-name")).to_have_text("ada", timeout=WAIT_MS)
    page.click("#sign-out")

    api.expect(page.locator("#sign-in")).to_be_visible(timeout=WAIT_MS)
    assert page.evaluate("sessionStorage.length") == 0
    assert page.locator(".message").count() == 0


def test_an_ordinary_key_sees_queues_but_no_workers(
    guarded: RunningGateway, worker: ActingWorker, new_key: MakeKey, tab: Tab
) -> None:
    page = tab.open(guarded, "workers")
    page.fill("#key", new_key("ada"))
    page.press("#key", "Enter")

    api.expect(page.locator("#queue-table tbody tr")).to_have_count(1, timeout=WAIT_MS)
    api.expect(page.locator("#workers-note")).to_be_visible(timeout=WAIT_MS)
    assert page.locator(".worker").count() == 0


@pytest.mark.parametrize("view", ["chat", "jobs", "workers"])
def test_a_phone_never_scrolls_sideways(
    gateway: RunningGateway, worker: ActingWorker, embedded_server: EmbeddedServer, browser: api.Browser, view: str
) -> None:
    with Client(embedded_server.url) as client:
        client.submit("Hi", model=MODEL, user="u" * 64)
    tab = Tab(browser, width=360)
    page = tab.open(gateway, view)
    page.wait_for_selector({"chat": "#composer", "jobs": "#job-table td", "workers": ".worker"}[view])

    widths = page.evaluate("[document.documentElement.scrollWidth, document.querySelector('main').scrollWidth]")
    tab.context.close()

    assert max(widths) <= 360
    assert tab.errors == []


def test_the_page_says_when_the_gateway_is_gone(embedded_server: EmbeddedServer, browser: api.Browser) -> None:
    tab = Tab(browser)
    with RunningGateway(embedded_server.url) as gateway:
        page = tab.open(gateway, "workers")
        api.expect(page.locator("#workers-empty")).to_be_visible(timeout=WAIT_MS)

    api.expect(page.locator("#trouble")).to_contain_text("does not answer", timeout=WAIT_MS)
    tab.context.close()
