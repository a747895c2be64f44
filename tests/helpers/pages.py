"""Reads a report's page as a program does: its tables with the numbers of the JSON, its texts, its figures."""

import json
from html.parser import HTMLParser


class Page(HTMLParser):
    """A page's parts."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.figures, self.text = {}, {}, ""
        self.sections = {}  # name -> its text
        self.plots = {}  # name of a section -> ids of its figures
        self._table = self._row = self._section = self._script = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        if tag == "section":
            self._section = named["id"]
            self.sections[self._section], self.plots[self._section] = "", []
        elif tag == "table":
            self._table = self.tables.setdefault(named["data-name"], [])
        elif tag == "tr":
            self._row = []
            self._table.append(self._row)
        elif tag in ("td", "th"):
            self._row.append("")
        elif tag == "data":
            self._row[-1] = float(named["value"])
        elif tag == "script":
            self._script = named.get("id", "")
        elif tag == "div" and named.get("class") == "plot":
            self.plots[self._section].append(named["id"])

    def handle_endtag(self, tag):
        if tag == "section":
            self._section = None
        elif tag == "table":
            self._table = self._row = None
        elif tag == "script":
            self._script = None

    def handle_data(self, data):
        if self._script is not None:
            if self._script == "figures":
                self.figures = json.loads(data)
            return
        self.text += data
        if self._section is not None:
            self.sections[self._section] += data
        if self._row and isinstance(self._row[-1], str):
            self._row[-1] += data

    def row(self, table, head):
        """The cells of a table's row by its head: numbers as in the JSON, other texts as they are."""
        (found,) = (row[1:] for row in self.tables[table][1:] if row[0] == head)
        return found

    def trace(self, figure, name):
        """A figure's trace by its name."""
        (found,) = (one for one in self.figures[figure]["data"] if one.get("name") == name)
        return found
