"""Names of files and classes as cells of tables, which a spreadsheet shows but never evaluates as formulas."""

FORMULA = ("=", "+", "-", "@")  # first characters of formulas, as listed by OWASP's page on CSV injection


def plain_cell(text: str) -> str:
    """Put a ' before text that a spreadsheet would take for a formula, as OWASP advises; numbers stay as they are."""
    try:
        float(text)
    except ValueError:
        return f"'{text}" if text.lstrip().startswith(FORMULA) else text
    return text


def cell_text(cell: str) -> str:
    """Remove the ' that `plain_cell` has put before a text."""
    text = cell.removeprefix("'")
    return text if plain_cell(text) == cell else cell
