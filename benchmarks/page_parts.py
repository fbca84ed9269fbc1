"""Parts of a page of markdown that a benchmark writes, each between `<!-- part NAME -->` and `<!-- end of NAME -->`."""


def put(page: str, name: str, content: str) -> str:
    """`page` with `content` as that part. Raises ValueError where it has no such part."""
    begin, end = f"<!-- part {name} -->", f"<!-- end of {name} -->"
    before, *after = page.split(begin)
    if len(after) != 1 or end not in after[0]:
        raise ValueError(f"the page has no part {name}: add the lines {begin} and {end}")
    return f"{before}{begin}\n\n{content.strip()}\n\n{end}{after[0].partition(end)[2]}"
