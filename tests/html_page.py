"""A page of ours, taken apart: every tag closed, and what a reader sees."""

from __future__ import annotations

from html.parser import HTMLParser


class Page(HTMLParser):
    """Tags in order and balanced; every attribute; the text as it runs on (`text`), and a line for each element's piece
    of it (`words`), so that no word is found across two of them."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.words = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "!doctype"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "title"):
            self.text += data
            self.words += data + "\n"
