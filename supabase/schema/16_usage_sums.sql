-- Usage sums: settled requests, added up by the database for reports.
--
-- usage_slots counts by quarter of an hour, so that a day of any time zone is made of whole slots; usage_days
-- by UTC day, for long ranges; usage_totals by quarter of an hour over all users. The closed part of the
-- journal is added up now and then, by the sweep or before a report. The rest is counted from the journal
-- itself, so a report is always complete. Admission and settlement pay nothing for it.

-- Tables
-- ------

create table public.usage_slots (
    user_id bigint not null references public.users (id),
    slot timestamptz not null,
    key_id bigint not null,
    model text not null collate "C",
    provider text not null collate "C",
    environment text not null collate "C",
    endpoint text not null collate "C",
    status text not null collate "C",
    error_code text not null collate "C",
    requests bigint not null default 0,
    prompt_tokens bigint not null default 0,
    completion_tokens bigint not null default 0,
    cached_tokens bigint not null default 0,
    reasoning_tokens bigint not null default 0,
    cost_nanos bigint not null default 0,
    upstream_cost_nanos bigint not null default 0,
    overrun_nanos bigint not null default 0,
    latency_ms_total bigint not null default 0,
    latency_00 integer not null default 0, latency_01 integer not null default 0,
    latency_02 integer not null default 0, latency_03 integer not null default 0,
    latency_04 integer not null default 0, latency_05 integer not null default 0,
    latency_06 integer not null default 0, latency_07 integer not null default 0,
    latency_08 integer not null default 0, latency_09 integer not null default 0,
    latency_10 integer not null default 0, latency_11 integer not null default 0,
    latency_12 integer not null default 0, latency_13 integer not null default 0,
    latency_14 integer not null default 0, latency_15 integer not null default 0,
    latency_16 integer not null default 0, latency_17 integer not null default 0,
    latency_18 integer not null default 0, latency_19 integer not null default 0,
    latency_20 integer not null default 0, latency_21 integer not null default 0,
    latency_22 integer not null default 0, latency_23 integer not null default 0,
    primary key (user_id, slot, key_id, model, provider, environment, endpoint, status, error_code)
) with (fillfactor = 70);
comment on table public.usage_slots is 'Settled requests by quarter of an hour; adds up to usage_records.';
create index usage_slots_slot_idx on public.usage_slots (slot);
alter table public.usage_slots enable row level security;
revoke all on public.usage_slots from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.usage_slots to service_role;

create table public.usage_totals (
    slot timestamptz not null,
    model text not null collate "C",
    provider text not null collate "C",
    environment text not null collate "C",
    endpoint text not null collate "C",
    status text not null collate "C",
    error_code text not null collate "C",
    requests bigint not null default 0,
    prompt_tokens bigint not null default 0,
    completion_tokens bigint not null default 0,
    cached_tokens bigint not null default 0,
    reasoning_tokens bigint not null default 0,
    cost_nanos bigint not null default 0,
    upstream_cost_nanos bigint not null default 0,
    overrun_nanos bigint not null default 0,
    latency_ms_total bigint not null default 0,
    latency_00 integer not null default 0, latency_01 integer not null default 0,
    latency_02 integer not null default 0, latency_03 integer not null default 0,
    latency_04 integer not null default 0, latency_05 integer not null default 0,
    latency_06 integer not null default 0, latency_07 integer not null default 0,
    latency_08 integer not null default 0, latency_09 integer not null default 0,
    latency_10 integer not null default 0, latency_11 integer not null default 0,
    latency_12 integer not null default 0, latency_13 integer not null default 0,
    latency_14 integer not null default 0, latency_15 integer not null default 0,
    latency_16 integer not null default 0, latency_17 integer not null default 0,
    latency_18 integer not null default 0, latency_19 integer not null default 0,
    latency_20 integer not null default 0, latency_21 integer not null default 0,
    latency_22 integer not null default 0, latency_23 integer not null default 0,
    primary key (slot, model, provider, environment, endpoint, status, error_code)
) with (fillfactor = 70);
comment on table public.usage_totals is
    'Settled requests of everybody by quarter of an hour; adds up to usage_slots.';
alter table public.usage_totals enable row level security;
revoke all on public.usage_totals from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.usage_totals to service_role;

create table public.usage_days (
    user_id bigint not null references public.users (id),
    day date not null,
    key_id bigint not null,
    model text not null collate "C",
    provider text not null collate "C",
    environment text not null collate "C",
    endpoint text not null collate "C",
    status text not null collate "C",
    error_code text not null collate "C",
    requests bigint not null default 0,
    prompt_tokens bigint not null default 0,
    completion_tokens bigint not null default 0,
    cached_tokens bigint not null default 0,
    reasoning_tokens bigint not null default 0,
    cost_nanos bigint not null default 0,
    upstream_cost_nanos bigint not null default 0,
    overrun_nanos bigint not null default 0,
    latency_ms_total bigint not null default 0,
    latency_00 integer not null default 0, latency_01 integer not null default 0,
    latency_02 integer not null default 0, latency_03 integer not null default 0,
    latency_04 integer not null default 0, latency_05 integer not null default 0,
    latency_06 integer not null default 0, latency_07 integer not null default 0,
    latency_08 integer not null default 0, latency_09 integer not null default 0,
    latency_10 integer not null default 0, latency_11 integer not null default 0,
    latency_12 integer not null default 0, latency_13 integer not null default 0,
    latency_14 integer not null default 0, latency_15 integer not null default 0,
    latency_16 integer not null default 0, latency_17 integer not null default 0,
    latency_18 integer not null default 0, latency_19 integer not null default 0,
    latency_20 integer not null default 0, latency_21 integer not null default 0,
    latency_22 integer not null default 0, latency_23 integer not null default 0,
    primary key (user_id, day, key_id, model, provider, environment, endpoint, status, error_code)
) with (fillfactor = 70);
comment on table public.usage_days is 'Settled requests by UTC day; adds up to usage_slots.';
create index usage_days_day_idx on public.usage_days (day);
alter table public.usage_days enable row level security;
revoke all on public.usage_days from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.usage_days to service_role;

create table public.usage_sums_state (
    singleton boolean primary key default true check (singleton),
    summed_until timestamptz not null default '-infinity'
);
comment on table public.usage_sums_state is
    'One row: requests admitted before summed_until are in the sums, later ones are counted as they stand.';
alter table public.usage_sums_state enable row level security;
revoke all on public.usage_sums_state from public, anon, authenticated, service_role;
grant select, insert, update on public.usage_sums_state to service_role;
insert into public.usage_sums_state default values;

-- Adding up
-- ---------

create function public.latency_bounds() returns bigint[] language sql immutable set search_path = '' as $$
    select array[25, 50, 100, 150, 200, 300, 400, 500, 750, 1000, 1500, 2000, 3000, 4000, 5000, 7500, 10000,
                 15000, 20000, 30000, 60000, 120000, 300000]::bigint[]
$$;
comment on function public.latency_bounds is
    'Upper bounds, in milliseconds, of latency_00 and the following; the last column has none.';
revoke all on function public.latency_bounds() from public, anon, authenticated;
grant execute on function public.latency_bounds() to service_role;

-- Settled requests of a range of admission times, in the shape of usage_slots. The upstream's cost here is
-- the operator's: what users paid the upstream under their own keys is in their records only.
create function public.count_usage(
    p_user_id bigint, p_from timestamptz, p_until timestamptz
) returns setof public.usage_slots language sql stable set search_path = '' as $$
    select r.user_id, date_bin('15 minutes', r.created_at, '2000-01-01 00:00:00+00'), r.key_id,
           coalesce(r.model_used, r.model), coalesce(r.provider, ''), r.environment, r.endpoint, r.status,
           coalesce(r.error_code, ''), count(*), coalesce(sum(r.prompt_tokens), 0)::bigint,
           coalesce(sum(r.completion_tokens), 0)::bigint, coalesce(sum(r.cached_tokens), 0)::bigint,
           coalesce(sum(r.reasoning_tokens), 0)::bigint, sum(r.cost_nanos)::bigint,
           coalesce(sum(r.upstream_cost_nanos) filter (where not r.byok), 0)::bigint,
           sum(r.overrun_nanos)::bigint, coalesce(sum(r.latency_ms), 0)::bigint,
           (count(*) filter (where b.bucket = 0))::int, (count(*) filter (where b.bucket = 1))::int,
           (count(*) filter (where b.bucket = 2))::int, (count(*) filter (where b.bucket = 3))::int,
           (count(*) filter (where b.bucket = 4))::int, (count(*) filter (where b.bucket = 5))::int,
           (count(*) filter (where b.bucket = 6))::int, (count(*) filter (where b.bucket = 7))::int,
           (count(*) filter (where b.bucket = 8))::int, (count(*) filter (where b.bucket = 9))::int,
           (count(*) filter (where b.bucket = 10))::int, (count(*) filter (where b.bucket = 11))::int,
           (count(*) filter (where b.bucket = 12))::int, (count(*) filter (where b.bucket = 13))::int,
           (count(*) filter (where b.bucket = 14))::int, (count(*) filter (where b.bucket = 15))::int,
           (count(*) filter (where b.bucket = 16))::int, (count(*) filter (where b.bucket = 17))::int,
           (count(*) filter (where b.bucket = 18))::int, (count(*) filter (where b.bucket = 19))::int,
           (count(*) filter (where b.bucket = 20))::int, (count(*) filter (where b.bucket = 21))::int,
           (count(*) filter (where b.bucket = 22))::int, (count(*) filter (where b.bucket = 23))::int
    from public.usage_records r,
         lateral (select width_bucket(coalesce(r.latency_ms, 0), public.latency_bounds()) as bucket) as b
    where (p_user_id is null or r.user_id = p_user_id) and r.created_at >= p_from and r.created_at < p_until
      and r.status <> 'pending'
    group by 1, 2, 3, 4, 5, 6, 7, 8, 9
$$;
revoke all on function public.count_usage(bigint, timestamptz, timestamptz) from public, anon, authenticated;
grant execute on function public.count_usage(bigint, timestamptz, timestamptz) to service_role;

-- Adds up what is closed: whole slots before the oldest pending request, at most a day in one call. Returns
-- whether there is more.
create function public.sum_up_usage() returns boolean language plpgsql set search_path = '' as $$
declare
    v_from timestamptz;
    v_closed timestamptz;
    v_until timestamptz;
begin
    -- The counters of an address are of no use after their longest window, an hour.
    delete from public.rate_limit_usage
    where subject = 'address'
      and coalesce(last_used_at, '-infinity') < clock_timestamp() - interval '2 hours';
    select summed_until into v_from from public.usage_sums_state for update skip locked;
    -- Another instance is adding up.
    if not found then
        return false;
    end if;
    select date_bin('15 minutes', least(clock_timestamp() - interval '1 minute', min(r.created_at)),
                    '2000-01-01 00:00:00+00') into v_closed
    from public.usage_records r
    where r.expires_at >= (select swept_until from public.gateway_state) and r.status = 'pending';
    select greatest(v_from, date_bin('15 minutes', min(r.created_at), '2000-01-01 00:00:00+00')) into v_from
    from public.usage_records r where r.created_at >= v_from;
    v_until := least(v_closed, v_from + interval '1 day');
    if v_until is null or v_until <= v_from then
        return false;
    end if;
    with counted as (
        select * from public.count_usage(null, v_from, v_until)
    ), by_slot as (
        insert into public.usage_slots select * from counted
    ), totals as (
        insert into public.usage_totals
        select s.slot, s.model, s.provider, s.environment, s.endpoint, s.status, s.error_code,
               sum(s.requests), sum(s.prompt_tokens), sum(s.completion_tokens), sum(s.cached_tokens),
               sum(s.reasoning_tokens), sum(s.cost_nanos), sum(s.upstream_cost_nanos), sum(s.overrun_nanos),
               sum(s.latency_ms_total), sum(s.latency_00), sum(s.latency_01), sum(s.latency_02),
               sum(s.latency_03), sum(s.latency_04), sum(s.latency_05), sum(s.latency_06), sum(s.latency_07),
               sum(s.latency_08), sum(s.latency_09), sum(s.latency_10), sum(s.latency_11), sum(s.latency_12),
               sum(s.latency_13), sum(s.latency_14), sum(s.latency_15), sum(s.latency_16), sum(s.latency_17),
               sum(s.latency_18), sum(s.latency_19), sum(s.latency_20), sum(s.latency_21), sum(s.latency_22),
               sum(s.latency_23)
        from counted s group by 1, 2, 3, 4, 5, 6, 7
    )
    insert into public.usage_days as d
    select s.user_id, (s.slot at time zone 'UTC')::date, s.key_id, s.model, s.provider, s.environment,
           s.endpoint, s.status, s.error_code, sum(s.requests), sum(s.prompt_tokens),
           sum(s.completion_tokens), sum(s.cached_tokens), sum(s.reasoning_tokens), sum(s.cost_nanos),
           sum(s.upstream_cost_nanos), sum(s.overrun_nanos), sum(s.latency_ms_total), sum(s.latency_00),
           sum(s.latency_01), sum(s.latency_02), sum(s.latency_03), sum(s.latency_04), sum(s.latency_05),
           sum(s.latency_06), sum(s.latency_07), sum(s.latency_08), sum(s.latency_09), sum(s.latency_10),
           sum(s.latency_11), sum(s.latency_12), sum(s.latency_13), sum(s.latency_14), sum(s.latency_15),
           sum(s.latency_16), sum(s.latency_17), sum(s.latency_18), sum(s.latency_19), sum(s.latency_20),
           sum(s.latency_21), sum(s.latency_22), sum(s.latency_23)
    from counted s group by 1, 2, 3, 4, 5, 6, 7, 8, 9
    on conflict (user_id, day, key_id, model, provider, environment, endpoint, status, error_code)
    do update set
           requests = d.requests + excluded.requests,
           prompt_tokens = d.prompt_tokens + excluded.prompt_tokens,
           completion_tokens = d.completion_tokens + excluded.completion_tokens,
           cached_tokens = d.cached_tokens + excluded.cached_tokens,
           reasoning_tokens = d.reasoning_tokens + excluded.reasoning_tokens,
           cost_nanos = d.cost_nanos + excluded.cost_nanos,
           upstream_cost_nanos = d.upstream_cost_nanos + excluded.upstream_cost_nanos,
           overrun_nanos = d.overrun_nanos + excluded.overrun_nanos,
           latency_ms_total = d.latency_ms_total + excluded.latency_ms_total,
           latency_00 = d.latency_00 + excluded.latency_00, latency_01 = d.latency_01 + excluded.latency_01,
           latency_02 = d.latency_02 + excluded.latency_02, latency_03 = d.latency_03 + excluded.latency_03,
           latency_04 = d.latency_04 + excluded.latency_04, latency_05 = d.latency_05 + excluded.latency_05,
           latency_06 = d.latency_06 + excluded.latency_06, latency_07 = d.latency_07 + excluded.latency_07,
           latency_08 = d.latency_08 + excluded.latency_08, latency_09 = d.latency_09 + excluded.latency_09,
           latency_10 = d.latency_10 + excluded.latency_10, latency_11 = d.latency_11 + excluded.latency_11,
           latency_12 = d.latency_12 + excluded.latency_12, latency_13 = d.latency_13 + excluded.latency_13,
           latency_14 = d.latency_14 + excluded.latency_14, latency_15 = d.latency_15 + excluded.latency_15,
           latency_16 = d.latency_16 + excluded.latency_16, latency_17 = d.latency_17 + excluded.latency_17,
           latency_18 = d.latency_18 + excluded.latency_18, latency_19 = d.latency_19 + excluded.latency_19,
           latency_20 = d.latency_20 + excluded.latency_20, latency_21 = d.latency_21 + excluded.latency_21,
           latency_22 = d.latency_22 + excluded.latency_22, latency_23 = d.latency_23 + excluded.latency_23;
    update public.usage_sums_state set summed_until = v_until where singleton;
    return v_until < v_closed;
end $$;
revoke all on function public.sum_up_usage() from public, anon, authenticated;
grant execute on function public.sum_up_usage() to service_role;

-- A record that was settled without a known cost may be amended after it was added up: the sums follow.
create function public.correct_sums() returns trigger language plpgsql set search_path = '' as $$
begin
    -- Waits for a sum that is under way, and only then reads how far it came.
    perform from public.usage_sums_state for update;
    if not exists (select from public.usage_sums_state where old.created_at < summed_until) then
        return null;
    end if;
    delete from public.usage_slots s
    where s.user_id = new.user_id
      and s.slot = date_bin('15 minutes', new.created_at, '2000-01-01 00:00:00+00');
    insert into public.usage_slots select * from public.count_usage(
        new.user_id, date_bin('15 minutes', new.created_at, '2000-01-01 00:00:00+00'),
        date_bin('15 minutes', new.created_at, '2000-01-01 00:00:00+00') + interval '15 minutes');
    delete from public.usage_totals
    where slot = date_bin('15 minutes', new.created_at, '2000-01-01 00:00:00+00');
    insert into public.usage_totals
    select s.slot, s.model, s.provider, s.environment, s.endpoint, s.status, s.error_code,
           sum(s.requests), sum(s.prompt_tokens), sum(s.completion_tokens), sum(s.cached_tokens),
           sum(s.reasoning_tokens), sum(s.cost_nanos), sum(s.upstream_cost_nanos), sum(s.overrun_nanos),
           sum(s.latency_ms_total), sum(s.latency_00), sum(s.latency_01), sum(s.latency_02),
           sum(s.latency_03), sum(s.latency_04), sum(s.latency_05), sum(s.latency_06), sum(s.latency_07),
           sum(s.latency_08), sum(s.latency_09), sum(s.latency_10), sum(s.latency_11), sum(s.latency_12),
           sum(s.latency_13), sum(s.latency_14), sum(s.latency_15), sum(s.latency_16), sum(s.latency_17),
           sum(s.latency_18), sum(s.latency_19), sum(s.latency_20), sum(s.latency_21), sum(s.latency_22),
           sum(s.latency_23)
    from public.usage_slots s where s.slot = date_bin('15 minutes', new.created_at, '2000-01-01 00:00:00+00')
    group by 1, 2, 3, 4, 5, 6, 7;
    delete from public.usage_days d
    where d.user_id = new.user_id and d.day = (new.created_at at time zone 'UTC')::date;
    insert into public.usage_days
    select s.user_id, (s.slot at time zone 'UTC')::date, s.key_id, s.model, s.provider, s.environment,
           s.endpoint, s.status, s.error_code, sum(s.requests), sum(s.prompt_tokens),
           sum(s.completion_tokens), sum(s.cached_tokens), sum(s.reasoning_tokens), sum(s.cost_nanos),
           sum(s.upstream_cost_nanos), sum(s.overrun_nanos), sum(s.latency_ms_total), sum(s.latency_00),
           sum(s.latency_01), sum(s.latency_02), sum(s.latency_03), sum(s.latency_04), sum(s.latency_05),
           sum(s.latency_06), sum(s.latency_07), sum(s.latency_08), sum(s.latency_09), sum(s.latency_10),
           sum(s.latency_11), sum(s.latency_12), sum(s.latency_13), sum(s.latency_14), sum(s.latency_15),
           sum(s.latency_16), sum(s.latency_17), sum(s.latency_18), sum(s.latency_19), sum(s.latency_20),
           sum(s.latency_21), sum(s.latency_22), sum(s.latency_23)
    from public.usage_slots s
    where s.user_id = new.user_id
      and (s.slot at time zone 'UTC')::date = (new.created_at at time zone 'UTC')::date
    group by 1, 2, 3, 4, 5, 6, 7, 8, 9;
    return null;
end $$;
revoke all on function public.correct_sums() from public, anon, authenticated;
grant execute on function public.correct_sums() to service_role;

create trigger usage_records_amended after update of status on public.usage_records
    for each row when (old.status <> 'pending') execute function public.correct_sums();

-- Proof
-- -----

-- Where the journal and its sums differ. It never returns a row.
create function public.audit_usage()
returns table (user_id bigint, part text, journal numeric, sums numeric)
language sql stable set search_path = '' as $$
    with journal as (
        select r.user_id, count(*)::numeric as requests, sum(r.cost_nanos) as cost,
               sum(coalesce(r.prompt_tokens, 0) + coalesce(r.completion_tokens, 0)) as tokens
        from public.usage_records r
        where r.status <> 'pending' and r.created_at < (select summed_until from public.usage_sums_state)
        group by 1
    ), slots as (
        select s.user_id, sum(s.requests) as requests, sum(s.cost_nanos) as cost,
               sum(s.prompt_tokens + s.completion_tokens) as tokens
        from public.usage_slots s group by 1
    ), days as (
        select d.user_id, sum(d.requests) as requests, sum(d.cost_nanos) as cost,
               sum(d.prompt_tokens + d.completion_tokens) as tokens
        from public.usage_days d group by 1
    ), compared as (
        select u.id, x.part, x.journal, x.sums from public.users u
        left join journal j on j.user_id = u.id left join slots s on s.user_id = u.id
        left join days d on d.user_id = u.id,
        lateral (values
            ('slot requests', j.requests, s.requests), ('slot cost', j.cost, s.cost),
            ('slot tokens', j.tokens, s.tokens), ('day requests', j.requests, d.requests),
            ('day cost', j.cost, d.cost), ('day tokens', j.tokens, d.tokens)
        ) as x (part, journal, sums)
    )
    select c.id, c.part, coalesce(c.journal, 0), coalesce(c.sums, 0) from compared c
    where coalesce(c.journal, 0) <> coalesce(c.sums, 0)
    union all
    select null, 'totals', s.cost, t.cost
    from (select coalesce(sum(cost_nanos), 0) + coalesce(sum(requests), 0) as cost from public.usage_slots) s,
         (select coalesce(sum(cost_nanos), 0) + coalesce(sum(requests), 0) as cost from public.usage_totals) t
    where s.cost <> t.cost
$$;
revoke all on function public.audit_usage() from public, anon, authenticated;
grant execute on function public.audit_usage() to service_role;
