-- Reconciliation: our books beside the upstream's, and what stays open in them.

-- Open items
-- ----------

-- Requests that were settled without a known cost, and those that cost more than could be charged. Noted off
-- the hot path, when their part of the journal is closed; the rest of the journal is read as it is.
create table public.open_items (
    request_id uuid primary key references public.usage_records (request_id),
    noted_at timestamptz not null default clock_timestamp()
);
comment on table public.open_items is
    'Settled requests without a known cost, or above their hold. Ids are UUIDv7: they sort by time.';
alter table public.open_items enable row level security;
revoke all on public.open_items from public, anon, authenticated, service_role;
grant select, insert on public.open_items to service_role;

create table public.open_items_state (
    singleton boolean primary key default true check (singleton),
    noted_until timestamptz not null default '-infinity'
);
comment on table public.open_items_state is
    'One row: the journal before noted_until has been looked through.';
alter table public.open_items_state enable row level security;
revoke all on public.open_items_state from public, anon, authenticated, service_role;
grant select, insert, update on public.open_items_state to service_role;
insert into public.open_items_state default values;

-- Notes the open items of the closed part of the journal, in which every request is settled, once.
create function public.note_open_items() returns void language plpgsql set search_path = '' as $$
declare
    v_from timestamptz;
    v_until timestamptz := (select summed_until from public.usage_sums_state);
begin
    select noted_until into v_from from public.open_items_state for update skip locked;
    if not found or v_from >= v_until then
        return;
    end if;
    insert into public.open_items (request_id)
    select r.request_id from public.usage_records r
    where r.created_at >= v_from and r.created_at < v_until and r.status <> 'pending'
      and (r.settlement_source = 'none' or r.overrun_nanos > 0)
    on conflict do nothing;
    update public.open_items_state set noted_until = v_until where singleton;
end $$;
revoke all on function public.note_open_items() from public, anon, authenticated;
grant execute on function public.note_open_items() to service_role;

-- p_kind: expired (pending beyond their hold's time), unknown (settled without a known cost) or overrun (cost
-- more than could be charged). Newest first; p_before is the id of the last one seen.
create function public.list_open_items(p_kind text, p_before uuid, p_limit int) returns jsonb
language sql stable set search_path = '' as $$
    select coalesce(jsonb_agg(to_jsonb(x) order by x.request_id desc), '[]') from (
        select r.request_id, r.user_id, r.key_id, r.mode, r.environment, r.byok, r.endpoint, r.model,
               r.model_used, r.provider, r.status, r.settlement_source, r.error_code, r.generation_id,
               r.hold_nanos, r.upstream_cost_nanos, r.cost_nanos, r.overrun_nanos, r.created_at, r.expires_at,
               r.settled_at
        from (
            select n.* from public.usage_records n
            where p_kind = 'expired' and n.expires_at >= (select swept_until from public.gateway_state)
              and n.expires_at <= now() and n.status = 'pending'
            union all
            select n.* from public.open_items i join public.usage_records n on n.request_id = i.request_id
            where p_kind <> 'expired' and (p_before is null or i.request_id < p_before)
            union all
            select n.* from public.usage_records n
            where p_kind <> 'expired' and n.created_at >= (select noted_until from public.open_items_state)
              and n.status <> 'pending'
        ) as r
        where (p_before is null or r.request_id < p_before)
          and case p_kind when 'unknown' then r.settlement_source = 'none'
                          when 'overrun' then r.overrun_nanos > 0 else true end
        order by r.request_id desc limit p_limit) as x
$$;
revoke all on function public.list_open_items(text, uuid, int) from public, anon, authenticated;
grant execute on function public.list_open_items(text, uuid, int) to service_role;

-- Costs
-- -----

-- What live requests admitted since p_start have cost, as far as they are settled. Test requests, play money
-- and requests under users' own keys are not on the operator's bill.
create function public.live_costs(p_start timestamptz) returns jsonb
language sql stable set search_path = '' as $$
    with bounds as (
        select g.mode, g.live_from, s.summed_until,
               date_bin('15 minutes', g.live_from + interval '15 minutes' - interval '1 microsecond',
                        '2000-01-01 00:00:00+00') as whole_from
        from (select mode, case when mode = 'live' then greatest(p_start, mode_since)
                           else p_start end as live_from
              from public.gateway_state) as g, public.usage_sums_state s
    ), parts as (
        select t.requests, t.upstream_cost_nanos, t.cost_nanos, t.overrun_nanos
        from public.usage_totals t, bounds b
        where t.slot >= b.whole_from and t.slot < b.summed_until and t.environment <> 'test'
        union all
        -- Less what those sums hold beyond the operator's bill; its upstream cost is not in them.
        select -1, 0, -r.cost_nanos, -r.overrun_nanos
        from public.usage_records r, bounds b
        where r.byok and r.created_at >= b.whole_from and r.created_at < b.summed_until
          and r.status <> 'pending' and r.environment <> 'test'
        union all
        -- The rest of the quarter of an hour in which the database went live, and what is not added up yet.
        select 1, coalesce(r.upstream_cost_nanos, 0), r.cost_nanos, r.overrun_nanos
        from public.usage_records r, bounds b
        where (r.created_at >= b.live_from and r.created_at < least(b.whole_from, b.summed_until)
               or r.created_at >= greatest(b.live_from, b.summed_until))
          and r.mode = b.mode and r.status <> 'pending' and r.environment <> 'test' and not r.byok
    )
    select jsonb_build_object(
        'start', p_start, 'requests', coalesce(sum(requests), 0),
        'upstream_cost_nanos', coalesce(sum(upstream_cost_nanos), 0),
        'charged_nanos', coalesce(sum(cost_nanos), 0), 'overrun_nanos', coalesce(sum(overrun_nanos), 0))
    from parts
$$;
revoke all on function public.live_costs(timestamptz) from public, anon, authenticated;
grant execute on function public.live_costs(timestamptz) to service_role;

-- Costs of the UTC day, week and month.
create function public.reconcile_costs() returns jsonb language sql stable set search_path = '' as $$
    select jsonb_build_object(
        'mode', (select mode from public.gateway_state),
        'daily', public.live_costs(date_trunc('day', now(), 'UTC')),
        'weekly', public.live_costs(date_trunc('week', now(), 'UTC')),
        'monthly', public.live_costs(date_trunc('month', now(), 'UTC')))
$$;
revoke all on function public.reconcile_costs() from public, anon, authenticated;
grant execute on function public.reconcile_costs() to service_role;
