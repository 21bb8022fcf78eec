-- State: what the database remembers about itself, and which version its schema has.
--
-- For all files of this folder:
-- - Money is bigint nano-US-dollars (*_nanos); 1 credit is 1 US dollar.
-- - Every table has row level security on and no policy. Nothing is granted to public, anon or authenticated;
--   the service role works through grants.
-- - Functions that the gateway calls set an empty search_path. The others inherit it, because setting it
--   costs time at every call (docs/decisions/0005).
-- - An expected refusal is a returned row; RAISE is for misuse.
-- - A function that takes `p jsonb` returns an outcome. p also says who acts: actor, address, user_agent,
--   request_id.
-- - Whoever writes locks the users first, in the order of their ids, and reads clock_timestamp() after that.

-- Functions may name what a later file creates.
set check_function_bodies = off;

-- Hosted Supabase projects have this schema from the start.
create schema if not exists extensions;

-- Mode
-- ----

create table public.gateway_state (
    singleton boolean primary key default true check (singleton),
    mode text not null default 'sandbox' check (mode in ('sandbox', 'live')),
    mode_since timestamptz not null default now(),
    -- No record that expires before this moment is still pending: the sweep starts here.
    swept_until timestamptz not null default '-infinity'
);
comment on table public.gateway_state is 'One row: what this database remembers about itself.';
alter table public.gateway_state enable row level security;
revoke all on public.gateway_state from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.gateway_state to service_role;
insert into public.gateway_state default values;

-- Puts the database into this mode, or refuses: a live database never serves invented answers again. The
-- first live start ends play money.
create function public.enter_mode(p_mode text) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_mode text;
begin
    if p_mode is null or p_mode not in ('sandbox', 'live') then
        raise exception 'there is no mode %', p_mode using errcode = 'invalid_parameter_value';
    end if;
    -- Waits for registrations, which lock this row in share mode.
    select mode into v_mode from public.gateway_state where singleton for update;
    if v_mode = p_mode then
        return jsonb_build_object('outcome', 'entered', 'mode', v_mode);
    elsif v_mode = 'live' then
        return jsonb_build_object('outcome', 'refused', 'mode', v_mode);
    end if;
    update public.gateway_state set mode = 'live', mode_since = clock_timestamp() where singleton;
    with locked as (
        select id, credits_nanos - held_nanos as unheld from public.users order by id for no key update
    ), emptied as (
        update public.users u set credits_nanos = u.credits_nanos - l.unheld, is_funded = false
        from locked l where l.id = u.id and (l.unheld > 0 or u.is_funded)
        returning u.id, u.credits_nanos as left_nanos, l.unheld
    )
    insert into public.credit_transactions (user_id, kind, amount_nanos, balance_after_nanos, actor, reason)
    select e.id, 'expiry', -e.unheld, e.left_nanos, 'gateway', 'play credits end when the gateway goes live'
    from emptied e where e.unheld > 0 order by e.id;
    return jsonb_build_object('outcome', 'entered', 'mode', 'live');
end $$;
revoke all on function public.enter_mode(text) from public, anon, authenticated;
grant execute on function public.enter_mode(text) to service_role;

-- Version
-- -------

-- The number of the newest migration. The gateway does not start on a database that is older than its code.
create function public.schema_version() returns bigint language sql immutable set search_path = '' as $$
    select 20261130100100::bigint
$$;
revoke all on function public.schema_version() from public, anon, authenticated;
grant execute on function public.schema_version() to service_role;
