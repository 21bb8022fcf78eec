-- Limits on rate, concurrency and plans: what is allowed, what has been counted, and the decision.

-- What is allowed
-- ---------------

create table public.rate_limit_configs (
    subject text not null check (subject in ('default', 'user', 'key')),
    subject_id bigint not null,
    requests_per_minute bigint check (requests_per_minute >= 0),
    requests_per_hour bigint check (requests_per_hour >= 0),
    requests_per_day bigint check (requests_per_day >= 0),
    tokens_per_minute bigint check (tokens_per_minute >= 0),
    tokens_per_hour bigint check (tokens_per_hour >= 0),
    tokens_per_day bigint check (tokens_per_day >= 0),
    concurrency integer check (concurrency >= 0),
    burst bigint check (burst >= 0),
    updated_at timestamptz not null default now(),
    primary key (subject, subject_id)
);
comment on table public.rate_limit_configs is
    'Limits of a user or a key; null is unlimited, zero refuses all. A user without a row has the '
    'default''s; a key without one has only its user''s.';
alter table public.rate_limit_configs enable row level security;
revoke all on public.rate_limit_configs from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.rate_limit_configs to service_role;
insert into public.rate_limit_configs (
    subject, subject_id, requests_per_minute, requests_per_hour, requests_per_day,
    tokens_per_minute, tokens_per_hour, tokens_per_day)
values ('default', 0, 60, 1000, 10000, 10000, 100000, 1000000);

create trigger rate_limit_configs_default_stays before delete on public.rate_limit_configs
    for each row when (old.subject = 'default') execute function public.refuse_built_in_change();

create trigger rate_limit_configs_default_keeps_its_name
    before update of subject, subject_id on public.rate_limit_configs
    for each row when (old.subject = 'default'
                       and (new.subject, new.subject_id) <> (old.subject, old.subject_id))
    execute function public.refuse_built_in_change();

create trigger rate_limit_configs_no_truncate before truncate on public.rate_limit_configs
    for each statement execute function public.refuse_built_in_change();

-- What has been counted
-- ---------------------

create table public.rate_limit_usage (
    subject text not null,
    subject_id bigint not null,
    -- Null for a key without limits of its own: there is nothing to count for.
    burst_ring bigint[] default public.empty_ring(11),
    minute_ring bigint[] default public.empty_ring(7),
    hour_ring bigint[] default public.empty_ring(13),
    day_ring bigint[] default public.empty_ring(25),
    plan_day date not null default '-infinity',
    plan_day_requests bigint not null default 0,
    plan_day_tokens bigint not null default 0,
    plan_month date not null default '-infinity',
    plan_month_requests bigint not null default 0,
    plan_month_tokens bigint not null default 0,
    slots bigint not null default 0,
    test_slots bigint not null default 0,
    budget_since timestamptz not null default '-infinity',
    budget_spent_nanos bigint not null default 0,
    budget_held_nanos bigint not null default 0,
    requests_used bigint not null default 0,
    last_used_at timestamptz,
    -- No older request of this subject was still pending: a recount starts here.
    pending_since timestamptz not null default '-infinity',
    recounted_at timestamptz not null default '-infinity',
    -- How much of its budget (percent: 50, 80, 100) a key has been reported to have spent in the window.
    budget_level smallint not null default 0,
    primary key (subject, subject_id),
    -- One short expression: PostgreSQL reads a table's checks anew for every statement.
    constraint rate_limit_usage_never_negative check (
        least(slots, test_slots, budget_spent_nanos, budget_held_nanos, plan_day_tokens, plan_month_tokens)
        >= 0
    )
) with (fillfactor = 50);
comment on table public.rate_limit_usage is
    'The counters of a key, a user or a network address. No row is shared between users.';
alter table public.rate_limit_usage enable row level security;
revoke all on public.rate_limit_usage from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.rate_limit_usage to service_role;

-- The counters as of p_now: rings advanced, the plan's day and month begun anew, a budget of an earlier
-- window emptied together with the level that was reported of it.
create function public.advance_usage(
    p_usage public.rate_limit_usage, p_now timestamptz, p_budget_window text
) returns public.rate_limit_usage language plpgsql stable as $$
declare
    v_usage public.rate_limit_usage := p_usage;
    v_ms bigint := extract(epoch from p_now) * 1000;
    v_day date := (p_now at time zone 'UTC')::date;
    v_month date := date_trunc('month', p_now at time zone 'UTC')::date;
    v_since timestamptz;
begin
    v_usage.burst_ring := public.advance_ring(v_usage.burst_ring, 11, v_ms / 100);
    v_usage.minute_ring := public.advance_ring(v_usage.minute_ring, 7, v_ms / 10000);
    v_usage.hour_ring := public.advance_ring(v_usage.hour_ring, 13, v_ms / 300000);
    v_usage.day_ring := public.advance_ring(v_usage.day_ring, 25, v_ms / 3600000);
    if v_usage.plan_day < v_day then
        v_usage.plan_day := v_day;
        v_usage.plan_day_requests := 0;
        v_usage.plan_day_tokens := 0;
    end if;
    if v_usage.plan_month < v_month then
        v_usage.plan_month := v_month;
        v_usage.plan_month_requests := 0;
        v_usage.plan_month_tokens := 0;
    end if;
    if p_budget_window is not null then
        v_since := public.budget_start(p_budget_window, p_now);
        if v_usage.budget_since < v_since then
            v_usage.budget_since := v_since;
            v_usage.budget_spent_nanos := 0;
            v_usage.budget_level := 0;
        end if;
    end if;
    return v_usage;
end $$;
revoke all on function public.advance_usage(public.rate_limit_usage, timestamptz, text)
    from public, anon, authenticated;
grant execute on function public.advance_usage(public.rate_limit_usage, timestamptz, text) to service_role;

-- An address may do this p_limit times an hour. True counts the attempt, false refuses it.
create function public.count_address(p_subject text, p_limit bigint) returns boolean
language plpgsql set search_path = '' as $$
declare
    v_id bigint := hashtextextended(p_subject, 0);
    v_bucket bigint := extract(epoch from clock_timestamp()) * 1000 / 300000;
    v_ring bigint[];
begin
    insert into public.rate_limit_usage (subject, subject_id) values ('address', v_id) on conflict do nothing;
    select public.advance_ring(hour_ring, 13, v_bucket) into v_ring from public.rate_limit_usage
    where subject = 'address' and subject_id = v_id for no key update;
    if v_ring[27] >= p_limit then
        return false;
    end if;
    update public.rate_limit_usage set hour_ring = public.count_in_ring(v_ring, 13, null, 1, 0),
        last_used_at = clock_timestamp()
    where subject = 'address' and subject_id = v_id;
    return true;
end $$;
revoke all on function public.count_address(text, bigint) from public, anon, authenticated;
grant execute on function public.count_address(text, bigint) to service_role;

-- The decision
-- ------------

-- What the checks have found so far: the longest refusal (refused_window is null while there is none), and
-- the tightest limits for the headers.
create type public.limit_state as (
    refused_window text,
    refused_unit text,
    refused_limit bigint,
    frees_at_ms bigint,
    never boolean,
    request_limit bigint,
    request_left bigint,
    request_reset_ms bigint,
    token_limit bigint,
    token_left bigint,
    token_reset_ms bigint
);
revoke all on type public.limit_state from public, anon, authenticated;
grant usage on type public.limit_state to service_role;

-- Of several refusals the one that lasts longest is reported: after its Retry-After none of them stands in
-- the way.
create function public.refuse_until(
    p_state public.limit_state, p_window text, p_unit text, p_limit bigint, p_never boolean,
    p_frees_at_ms bigint
) returns public.limit_state language plpgsql immutable as $$
declare
    v_state public.limit_state := p_state;
begin
    if v_state.refused_window is null or (p_never, p_frees_at_ms) > (v_state.never, v_state.frees_at_ms) then
        v_state.refused_window := p_window;
        v_state.refused_unit := p_unit;
        v_state.refused_limit := p_limit;
        v_state.never := p_never;
        v_state.frees_at_ms := p_frees_at_ms;
    end if;
    return v_state;
end $$;
revoke all on function public.refuse_until(public.limit_state, text, text, bigint, boolean, bigint)
    from public, anon, authenticated;
grant execute on function public.refuse_until(public.limit_state, text, text, bigint, boolean, bigint)
    to service_role;

-- One window of one subject: refuses, and takes part in the search for the tightest limit.
create function public.check_window(
    p_state public.limit_state, p_window text, p_ring bigint[], p_size int, p_width_ms bigint,
    p_requests bigint, p_tokens bigint, p_need bigint
) returns public.limit_state language plpgsql immutable as $$
declare
    v_state public.limit_state := p_state;
    v_requests bigint := p_ring[2 * p_size + 1];
    v_tokens bigint := p_ring[2 * p_size + 2];
    v_empty_at bigint := (p_ring[2 * p_size + 3] + p_size) * p_width_ms;
begin
    if v_requests + 1 > p_requests then
        v_state := public.refuse_until(
            v_state, p_window, 'requests', p_requests, p_requests = 0,
            public.ring_frees_at(p_ring, p_size, p_width_ms, 0, v_requests + 1 - p_requests));
    end if;
    if v_tokens + p_need > p_tokens then
        v_state := public.refuse_until(
            v_state, p_window, 'tokens', p_tokens, p_need > p_tokens,
            public.ring_frees_at(p_ring, p_size, p_width_ms, p_size, v_tokens + p_need - p_tokens));
    end if;
    if p_requests - v_requests < v_state.request_left
       or (v_state.request_left is null and p_requests is not null) then
        v_state.request_limit := p_requests;
        v_state.request_left := p_requests - v_requests;
        v_state.request_reset_ms := v_empty_at;
    end if;
    if p_tokens - v_tokens < v_state.token_left or (v_state.token_left is null and p_tokens is not null) then
        v_state.token_limit := p_tokens;
        v_state.token_left := p_tokens - v_tokens;
        v_state.token_reset_ms := v_empty_at;
    end if;
    return v_state;
end $$;
revoke all on function public.check_window(
    public.limit_state, text, bigint[], int, bigint, bigint, bigint, bigint
) from public, anon, authenticated;
grant execute on function public.check_window(
    public.limit_state, text, bigint[], int, bigint, bigint, bigint, bigint
) to service_role;

-- All windows of one subject. Sizes and widths (ms) are those of the rings in rate_limit_usage.
create function public.check_limits(
    p_state public.limit_state, p_limits public.rate_limit_configs, p_usage public.rate_limit_usage,
    p_need bigint
) returns public.limit_state language plpgsql immutable as $$
declare
    v_state public.limit_state := p_state;
begin
    if p_limits.burst is not null then
        v_state := public.check_window(
            v_state, 'second', p_usage.burst_ring, 11, 100, p_limits.burst, null, p_need);
    end if;
    if p_limits.requests_per_minute is not null or p_limits.tokens_per_minute is not null then
        v_state := public.check_window(v_state, 'minute', p_usage.minute_ring, 7, 10000,
                                       p_limits.requests_per_minute, p_limits.tokens_per_minute, p_need);
    end if;
    if p_limits.requests_per_hour is not null or p_limits.tokens_per_hour is not null then
        v_state := public.check_window(v_state, 'hour', p_usage.hour_ring, 13, 300000,
                                       p_limits.requests_per_hour, p_limits.tokens_per_hour, p_need);
    end if;
    if p_limits.requests_per_day is not null or p_limits.tokens_per_day is not null then
        v_state := public.check_window(v_state, 'day', p_usage.day_ring, 25, 3600000,
                                       p_limits.requests_per_day, p_limits.tokens_per_day, p_need);
    end if;
    return v_state;
end $$;
revoke all on function public.check_limits(
    public.limit_state, public.rate_limit_configs, public.rate_limit_usage, bigint
) from public, anon, authenticated;
grant execute on function public.check_limits(
    public.limit_state, public.rate_limit_configs, public.rate_limit_usage, bigint
) to service_role;

-- One counter of a plan (a UTC day or month): refuses, and takes part in the search for the tightest limit.
create function public.check_plan_counter(
    p_state public.limit_state, p_window text, p_unit text, p_limit bigint, p_used bigint, p_need bigint,
    p_resets_ms bigint
) returns public.limit_state language plpgsql immutable as $$
declare
    v_state public.limit_state := p_state;
begin
    if p_limit is null then
        return v_state;
    end if;
    if p_used + p_need > p_limit then
        v_state := public.refuse_until(v_state, p_window, p_unit, p_limit, p_need > p_limit, p_resets_ms);
    end if;
    if p_unit = 'requests' and (v_state.request_left is null or p_limit - p_used < v_state.request_left) then
        v_state.request_limit := p_limit;
        v_state.request_left := p_limit - p_used;
        v_state.request_reset_ms := p_resets_ms;
    elsif p_unit = 'tokens' and (v_state.token_left is null or p_limit - p_used < v_state.token_left) then
        v_state.token_limit := p_limit;
        v_state.token_left := p_limit - p_used;
        v_state.token_reset_ms := p_resets_ms;
    end if;
    return v_state;
end $$;
revoke all on function public.check_plan_counter(
    public.limit_state, text, text, bigint, bigint, bigint, bigint
) from public, anon, authenticated;
grant execute on function public.check_plan_counter(
    public.limit_state, text, text, bigint, bigint, bigint, bigint
) to service_role;

-- All counters of a plan. p_factor scales its limits for the key's environment.
create function public.check_plan(
    p_state public.limit_state, p_plan public.plans, p_usage public.rate_limit_usage, p_factor numeric,
    p_need bigint, p_now timestamptz
) returns public.limit_state language plpgsql stable as $$
declare
    v_state public.limit_state := p_state;
    v_day_ends bigint := extract(epoch from (date_trunc('day', p_now, 'UTC') + interval '1 day')) * 1000;
    v_month_ends bigint := extract(epoch from
        ((date_trunc('month', p_now at time zone 'UTC') + interval '1 month') at time zone 'UTC')) * 1000;
begin
    v_state := public.check_plan_counter(
        v_state, 'plan day', 'requests', floor(p_plan.daily_request_limit * p_factor)::bigint,
        p_usage.plan_day_requests, 1, v_day_ends);
    v_state := public.check_plan_counter(
        v_state, 'plan day', 'tokens', floor(p_plan.daily_token_limit * p_factor)::bigint,
        p_usage.plan_day_tokens, p_need, v_day_ends);
    v_state := public.check_plan_counter(
        v_state, 'plan month', 'requests', floor(p_plan.monthly_request_limit * p_factor)::bigint,
        p_usage.plan_month_requests, 1, v_month_ends);
    v_state := public.check_plan_counter(
        v_state, 'plan month', 'tokens', floor(p_plan.monthly_token_limit * p_factor)::bigint,
        p_usage.plan_month_tokens, p_need, v_month_ends);
    return v_state;
end $$;
revoke all on function public.check_plan(
    public.limit_state, public.plans, public.rate_limit_usage, numeric, bigint, timestamptz
) from public, anon, authenticated;
grant execute on function public.check_plan(
    public.limit_state, public.plans, public.rate_limit_usage, numeric, bigint, timestamptz
) to service_role;

-- Plan, key and user: the refusal of this request, or the state that allows it.
create function public.check_all_limits(
    p_key public.api_keys_new, p_user public.users, p_plan public.plans,
    p_key_limits public.rate_limit_configs, p_key_usage public.rate_limit_usage,
    p_user_usage public.rate_limit_usage, p_need bigint, p_now timestamptz
) returns public.limit_state language plpgsql stable as $$
declare
    v_state public.limit_state;
    v_limits public.rate_limit_configs;
    v_running bigint := p_user_usage.slots;
begin
    v_state := public.check_plan(v_state, p_plan, p_user_usage,
                                 coalesce((p_plan.environment_factors ->> p_key.environment_tag)::numeric, 1),
                                 p_need, p_now);
    if p_key_limits.subject is not null then
        v_state := public.check_limits(v_state, p_key_limits, p_key_usage, p_need);
        if v_state.refused_window is null and p_key_usage.slots >= p_key_limits.concurrency then
            v_state.refused_window := 'concurrency';
            v_state.refused_limit := p_key_limits.concurrency;
        end if;
    end if;
    select * into v_limits from public.rate_limit_configs where subject = 'user' and subject_id = p_user.id;
    if not found then
        select * into v_limits from public.rate_limit_configs where subject = 'default' and subject_id = 0;
    end if;
    v_state := public.check_limits(v_state, v_limits, p_user_usage, p_need);
    v_limits.concurrency := least(v_limits.concurrency, p_plan.concurrency);
    -- All test keys of a user together run at most four requests at a time.
    if p_key.environment_tag = 'test' and p_user_usage.test_slots >= 4 then
        v_running := greatest(v_running, 4);
        v_limits.concurrency := least(v_limits.concurrency, 4);
    end if;
    if v_state.refused_window is null and v_running >= v_limits.concurrency then
        v_state.refused_window := 'concurrency';
        v_state.refused_limit := v_limits.concurrency;
    end if;
    if v_state.refused_window = 'concurrency' then
        v_state.never := v_state.refused_limit = 0;
        v_state.frees_at_ms := floor(extract(epoch from p_now) * 1000) + 1000;
    end if;
    return v_state;
end $$;
revoke all on function public.check_all_limits(
    public.api_keys_new, public.users, public.plans, public.rate_limit_configs, public.rate_limit_usage,
    public.rate_limit_usage, bigint, timestamptz
) from public, anon, authenticated;
grant execute on function public.check_all_limits(
    public.api_keys_new, public.users, public.plans, public.rate_limit_configs, public.rate_limit_usage,
    public.rate_limit_usage, bigint, timestamptz
) to service_role;

-- What clients are told
-- ---------------------

-- At least one second, so that no client comes back at once.
create function public.retry_after_seconds(p_frees_at_ms bigint, p_now timestamptz) returns bigint
language sql immutable as $$
    select greatest(1, ceil((p_frees_at_ms - extract(epoch from p_now) * 1000) / 1000.0))::bigint
$$;
revoke all on function public.retry_after_seconds(bigint, timestamptz) from public, anon, authenticated;
grant execute on function public.retry_after_seconds(bigint, timestamptz) to service_role;

create function public.limits_json(p_state public.limit_state, p_now timestamptz) returns jsonb
language sql immutable as $$
    select jsonb_build_object(
        'request_limit', p_state.request_limit, 'request_left', p_state.request_left,
        'request_reset', public.retry_after_seconds(p_state.request_reset_ms, p_now),
        'token_limit', p_state.token_limit, 'token_left', p_state.token_left,
        'token_reset', public.retry_after_seconds(p_state.token_reset_ms, p_now))
$$;
revoke all on function public.limits_json(public.limit_state, timestamptz) from public, anon, authenticated;
grant execute on function public.limits_json(public.limit_state, timestamptz) to service_role;

-- What admission would report of the rate limits for a request of no tokens. Counts nothing.
create function public.verified_limits(
    p_key public.api_keys_new, p_user public.users, p_now timestamptz
) returns jsonb language plpgsql stable as $$
declare
    v_none public.rate_limit_usage;
    v_user_usage public.rate_limit_usage;
    v_key_usage public.rate_limit_usage;
    v_key_limits public.rate_limit_configs;
begin
    v_none.burst_ring := public.empty_ring(11);
    v_none.minute_ring := public.empty_ring(7);
    v_none.hour_ring := public.empty_ring(13);
    v_none.day_ring := public.empty_ring(25);
    v_none.plan_day := '-infinity';
    v_none.plan_month := '-infinity';
    v_none.slots := 0;
    v_none.test_slots := 0;
    select * into v_user_usage from public.rate_limit_usage where subject = 'user' and subject_id = p_user.id;
    if not found then
        v_user_usage := v_none;
    end if;
    select * into v_key_limits from public.rate_limit_configs where subject = 'key' and subject_id = p_key.id;
    if found then
        select * into v_key_usage from public.rate_limit_usage
        where subject = 'key' and subject_id = p_key.id;
        if v_key_usage.day_ring is null then -- the key had no limits before, so nothing was counted
            v_none.slots := coalesce(v_key_usage.slots, 0);
            v_key_usage := v_none;
        end if;
    end if;
    return public.limits_json(public.check_all_limits(
        p_key, p_user, public.current_plan(p_user, p_now), v_key_limits,
        public.advance_usage(v_key_usage, p_now, null), public.advance_usage(v_user_usage, p_now, null),
        0, p_now), p_now);
end $$;
comment on function public.verified_limits is
    'What the headers of management answers say; management requests themselves are not counted.';
revoke all on function public.verified_limits(public.api_keys_new, public.users, timestamptz)
    from public, anon, authenticated;
grant execute on function public.verified_limits(public.api_keys_new, public.users, timestamptz)
    to service_role;

-- What a user may use and has used: the plan (if any), the limits that apply, the counters of today and this
-- month, and the rings.
create function public.read_limits(p_user_id bigint, p_key_id bigint) returns jsonb
language plpgsql stable set search_path = '' as $$
declare
    v_now timestamptz := clock_timestamp();
    v_user public.users;
    v_usage public.rate_limit_usage;
    v_limits public.rate_limit_configs;
begin
    select * into v_user from public.users where id = p_user_id;
    select * into v_usage from public.rate_limit_usage where subject = 'user' and subject_id = p_user_id;
    v_usage := public.advance_usage(v_usage, v_now, null);
    select * into v_limits from public.rate_limit_configs
    where (subject, subject_id) in (('user', p_user_id), ('default', 0))
    order by (subject = 'default') limit 1;
    return jsonb_build_object(
        'now', v_now, 'limits', to_jsonb(v_limits),
        'key_limits', (select to_jsonb(c) from public.rate_limit_configs c
                       where c.subject = 'key' and c.subject_id = p_key_id),
        'used', jsonb_build_object(
            'requests_per_minute', v_usage.minute_ring[15], 'tokens_per_minute', v_usage.minute_ring[16],
            'requests_per_hour', v_usage.hour_ring[27], 'tokens_per_hour', v_usage.hour_ring[28],
            'requests_per_day', v_usage.day_ring[51], 'tokens_per_day', v_usage.day_ring[52],
            'running', v_usage.slots),
        'plan', to_jsonb(public.current_plan(v_user, v_now)),
        'assigned', (select to_jsonb(up) from public.user_plans up
                     where up.user_id = p_user_id and up.is_active
                     and up.start_date <= v_now and v_now < up.end_date),
        'plan_used', jsonb_build_object(
            'daily_requests', v_usage.plan_day_requests, 'daily_tokens', v_usage.plan_day_tokens,
            'monthly_requests', v_usage.plan_month_requests, 'monthly_tokens', v_usage.plan_month_tokens));
end $$;
revoke all on function public.read_limits(bigint, bigint) from public, anon, authenticated;
grant execute on function public.read_limits(bigint, bigint) to service_role;

-- Administration
-- --------------

-- p: user_id or hashes, or hashes or key_id for one key; subject (user or key), limits {...}. Outcomes: set,
-- not_found.
create function public.set_rate_limits(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
    v_key bigint := case when p ->> 'subject' = 'key' then public.target_key(p) end;
    v_limits public.rate_limit_configs;
begin
    if v_user.id is null or (p ->> 'subject' = 'key' and not exists (
           select from public.api_keys_new k where k.id = v_key and k.user_id = v_user.id)) then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    select * into v_limits from public.rate_limit_configs
    where (subject, subject_id) in ((p ->> 'subject', coalesce(v_key, v_user.id)), ('default', 0))
    order by (subject = 'default') limit 1;
    -- A key without limits of its own starts unlimited, not with the default limits.
    if v_key is not null and v_limits.subject = 'default' then
        v_limits := null;
    end if;
    v_limits := jsonb_populate_record(v_limits, p -> 'limits');
    v_limits.subject := p ->> 'subject';
    v_limits.subject_id := coalesce(v_key, v_user.id);
    v_limits.updated_at := clock_timestamp();
    delete from public.rate_limit_configs
    where subject = v_limits.subject and subject_id = v_limits.subject_id;
    insert into public.rate_limit_configs select v_limits.*;
    perform public.write_audit(
        p ->> 'actor', 'set_limits', v_limits.subject || ':' || v_limits.subject_id, v_user.id, v_key,
        p ->> 'address', p ->> 'user_agent', (p ->> 'request_id')::uuid, p -> 'limits');
    return jsonb_build_object(
        'outcome', 'set', 'user_id', v_user.id, 'key_id', v_key, 'limits', to_jsonb(v_limits));
end $$;
revoke all on function public.set_rate_limits(jsonb) from public, anon, authenticated;
grant execute on function public.set_rate_limits(jsonb) to service_role;
