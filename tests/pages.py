"A page as a browser takes it apart, for what must be escaped."
import html.parser


class Page(html.parser.HTMLParser):
    "Text and tags of a page."
    def __init__(self, page): super().__init__(); self.tags, self.text = [], []; self.feed(page)
    def handle_starttag(self, tag, attrs): self.tags.append((tag, dict(attrs)))
    def handle_data(self, data): self.text.append(data)
