"""Names of files and classes as cells of tables: whatever is in them, a spreadsheet shows it and computes nothing."""

FORMULA = ("=", "+", "-", "@")  # how a formula begins, as OWASP's page on CSV injection lists


def plain_cell(text: str) -> str:
    """Put a ' before what a spreadsheet would take for a formula, as OWASP advises; numbers stay as they are."""
    try:
        float(text)
    except ValueError:
        return f"'{text}" if text.lstrip().startswith(FORMULA) else text
    return text


def cell_text(cell: str) -> str:
    """Take the ' away that `plain_cell` has put before a text."""
    text = cell.removeprefix("'")
    return text if plain_cell(text) == cell else cell
