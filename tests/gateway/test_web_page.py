"""The page's files: where they are, that they are whole, and the headers that keep everything else out."""

from __future__ import annotations

import http.client
import re

import pytest

from lamella_gateway.page_routes import POLICY, page_files
from tests.gateway.running_gateway import RunningGateway

Answer = tuple[int, dict[str, str], bytes]


def get(gateway: RunningGateway, path: str, **headers: str) -> Answer:
    connection = http.client.HTTPConnection(gateway.url.removeprefix("http://"), timeout=40)
    connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    found = response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
    connection.close()
    return found


@pytest.mark.parametrize("path", ["/", "/ui"])
def test_the_reader_is_sent_to_the_page(guarded: RunningGateway, path: str) -> None:
    status, headers, _ = get(guarded, path)

    assert (status, headers["location"]) == (307, "ui/")


def test_every_file_is_served_without_a_key_and_with_the_policy(guarded: RunningGateway) -> None:
    served = {name: get(guarded, f"/ui/{name}") for name in page_files()}
    index = get(guarded, "/ui/")

    assert index[2] == served["index.html"][2]
    assert {status for status, _, _ in served.values()} == {200}
    assert {headers["content-security-policy"] for _, headers, _ in served.values()} == {POLICY}
    assert {headers["x-content-type-options"] for _, headers, _ in served.values()} == {"nosniff"}
    assert {headers["cache-control"] for _, headers, _ in served.values()} == {"no-cache"}
    kinds = {
        name.rpartition(".")[2]: headers["content-type"].partition(";")[0] for name, (_, headers, _) in served.items()
    }
    assert kinds == {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


def test_a_file_that_the_reader_has_is_not_sent_again(gateway: RunningGateway) -> None:
    etag = get(gateway, "/ui/app.js")[1]["etag"]

    same = [get(gateway, "/ui/app.js", If_None_Match=tag) for tag in (etag, f"W/{etag}", f'"other", {etag}', "*")]
    other = get(gateway, "/ui/app.js", If_None_Match='"other"')

    assert [(status, body) for status, _, body in same] == [(304, b"")] * 4
    assert {headers["etag"] for _, headers, _ in same} == {etag}
    assert other[0] == 200


@pytest.mark.parametrize(
    "path", ["/ui/none.js", "/ui/..%2fapp.py", "/ui/../app.py", "/ui/%2e%2e/app.py", "/ui/.", "/ui/a/b", "/ui/%00"]
)
def test_nothing_but_the_page_is_served(gateway: RunningGateway, path: str) -> None:
    status, _, body = get(gateway, path)

    assert status == 404
    assert b"error" in body


def test_the_policy_lets_nothing_in_from_elsewhere_and_nothing_inline() -> None:
    rules = dict(rule.split(" ", 1) for rule in POLICY.split("; "))

    assert rules["default-src"] == "'none'"
    assert {rules[name] for name in ("script-src", "style-src", "img-src", "connect-src")} == {"'self'"}
    assert "unsafe" not in POLICY
    assert rules["require-trusted-types-for"] == "'script'"


def test_the_files_name_only_each_other_and_hold_nothing_inline() -> None:
    texts = {name: file.body.decode() for name, file in page_files().items()}
    index = texts["index.html"]

    named = set(re.findall(r'(?:src|href)="([^"#][^"]*)"', index))
    named |= {name for text in texts.values() for name in re.findall(r'from "\./([^"]+)"', text)}

    assert named == set(texts) - {"index.html"}
    assert not re.search(r"<style|<script>|\son\w+=|\sstyle=|javascript:", index)
    without_names = [text.replace("http://www.w3.org/2000/svg", "") for text in texts.values()]
    assert not any(re.search(r"https?://|//[a-z]+\.[a-z]", text) for text in without_names)


def test_no_script_makes_markup_of_text() -> None:
    scripts = "\n".join(file.body.decode() for name, file in page_files().items() if name.endswith(".js"))

    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|srcdoc", scripts
    )
