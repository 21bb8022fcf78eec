import asyncio, httpx
from conftest import *
async def test_x(gateway):
    u = await gateway.register(environment="test")
    for m in ("openai/gpt-4o-mini:slow;ms=\x00", "openai/gpt-4o-mini:slow;ms=1", "openai/gpt-4o-mini:\x00slow", "openai/gpt-4o-mini:slow:\x00", "\x00", "openai/gpt-4o-mini:slow;\x00;ms=5"):
        a, b = await asyncio.gather(u.chat(model=m), u.chat())
        print("RES", repr(m), a.status_code, a.text[:150], b.status_code, b.text[:100] if b.status_code!=200 else "")
async def test_conns(live_gateway, upstream):
    u = await live_gateway.register(credits=1)
    ports=set()
    orig = upstream.sandbox
    seen=[]
    class Spy:
        state = orig.state
        async def __call__(self, scope, receive, send):
            if scope["type"]=="http": seen.append((scope["path"], scope["client"]))
            await orig(scope, receive, send)
    upstream.sandbox = Spy()
    for s in (True, False):
        seen.clear()
        for _ in range(6): 
            a = await u.chat(stream=s)
        print("RES", s, len({c for p,c in seen if "chat" in p}), "connections for", len(seen))
