"""The claims of the course pages as Markdown: a table for each lab, and a page with all of them."""

from tools.tables import in_chinese, markdown_table, read_results

CLAIM_PAGES = ("docs/claims*.md", "Lab-*/README*.md")
SOURCES = {  # of the claims: the older course pages
    "lab-1.7": ("the DPO page", "DPO 頁面"),
    "lab-1.8": ("the ORPO lab page", "ORPO 實驗頁面"),
    "orpo-page": ("the ORPO page", "ORPO 介紹頁面"),
    "orpo-notes": ("the ORPO notes", "ORPO 筆記"),
}
CLAIMS_HEADER = (
    ["", "claim", "toy world", "real model", "where"],
    ["", "主張", "玩具世界", "真實模型", "位置"],
)
WORLDS = {"toy": ("Toy world", "玩具世界"), "real": ("Real model", "真實模型")}
LABS = {"1.7": "Lab-1.7-DPO_Alignment", "1.8": "Lab-1.8-ORPO_Alignment"}
NOTEBOOKS = {
    "1.7-01": "01-Setup_and_Data",
    "1.7-02": "02-SFT_Baseline",
    "1.7-03": "03-DPO_Training",
    "1.7-04": "04-Evaluation_and_Compare",
    "1.8-01": "01-Setup",
    "1.8-02": "02-ORPO_Training",
    "1.8-03": "03-Compare_with_DPO",
    "1.8-04": "04-Production_Deploy",
}


def notebook_path(number: str) -> str:
    """`1.7-03` → its path in the project."""
    return f"{LABS[number[:3]]}/{NOTEBOOKS[number]}.ipynb"


def _links(numbers: list[str], link) -> str:
    return ", ".join(f"[{number}]({link(notebook_path(number))})" for number in numbers)


def _verdict(text: str, chinese: bool) -> str:
    return in_chinese(text) if chinese else text


def lab_table(letter: str, link, chinese: bool = False) -> str:
    """The claims of one lab, D or O: one row each."""
    page = link("docs/claims.zh-TW.md" if chinese else "docs/claims.md")
    rows = []
    for name, entry in read_results("claims").items():
        if name.startswith(letter):
            rows.append(
                [
                    f"[{name}]({page}#{name.lower()})",
                    entry["claim"][chinese],
                    *(_verdict(entry[world]["verdict"], chinese) for world in WORLDS),
                    _links(entry["met"], link),
                ]
            )
    return markdown_table(CLAIMS_HEADER[chinese], rows) + "\n"


def claims_page(link, chinese: bool = False) -> str:
    """Every claim with its evidence: one heading a claim, so that `#d5` leads to D5."""
    parts = []
    for name, entry in read_results("claims").items():
        sources = [SOURCES[source][chinese] for source in entry["source"].split(", ")]
        lines = [f"### {name}", "", f"**{entry['claim'][chinese]}**"]
        lines[-1] += f"（{'、'.join(sources)}）" if chinese else f" ({', '.join(sources)})"
        lines.append("")
        for world, title in WORLDS.items():
            own = entry[world]
            text = f"- {title[chinese]}{'：' if chinese else ': '}"
            text += f"*{_verdict(own['verdict'], chinese)}*"
            lines.append(text)
            for line in own["evidence"]:
                lines.append(f"  - {_verdict(line, chinese)}")
        lines += ["", entry["note"][chinese], "", _links(entry["met"], link), ""]
        parts += lines
    return "\n".join(parts)
