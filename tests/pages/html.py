"""What is in a page, for the tests of every report."""

from html.parser import HTMLParser

VOID = {"meta", "img", "br", "wbr", "link"}


class Page(HTMLParser):
    """Collects what is in a page and checks that it is well nested."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.attributes, self.text = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def outline(text):
    """Return what a browser makes of a page but its words: tags and attributes, in their order; a long name may break or not."""
    page = Page(text)
    return [tag for tag in page.tags if tag != "wbr"], [(name, value) for name, value in page.attributes if name != "data-label"]


def with_texts(value, change, names=frozenset()):
    """Return what is read from JSON with every text in it changed; also what stands below a key of `names`."""
    if isinstance(value, dict):
        return {key: change(str(inner)) if key in names else with_texts(inner, change, names) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [with_texts(inner, change, names) for inner in value]
    return change(value) if isinstance(value, str) else value
