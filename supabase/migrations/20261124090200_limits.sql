-- Limits: counters in rings of buckets, one row per subject, and the arithmetic on them.
--
-- A ring of n buckets is a bigint[]: [1..n] requests, [n+1..2n] tokens, [2n+1] all requests, [2n+2] all tokens, [2n+3] the number of the
-- newest bucket (unix time / bucket width). The n buckets are those that touch the last window, so their sum never misses anything
-- that happened within it: no interval of the window's length ever exceeds the limit, and a place frees at most a bucket late.

create function public.empty_ring(p_size int) returns bigint[] language sql immutable set search_path = '' as $$
    select array_fill(0::bigint, array[2 * p_size + 3])
$$;
revoke all on function public.empty_ring(int) from public, anon, authenticated;
grant execute on function public.empty_ring(int) to service_role;

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
    -- Nothing of this subject that is older was still pending: where a recount has to start.
    pending_since timestamptz not null default '-infinity',
    recounted_at timestamptz not null default '-infinity',
    primary key (subject, subject_id),
    -- One short expression: PostgreSQL reads a table's checks anew for every statement.
    constraint rate_limit_usage_never_negative check (
        least(slots, test_slots, budget_spent_nanos, budget_held_nanos, plan_day_tokens, plan_month_tokens) >= 0
    )
) with (fillfactor = 50);
comment on table public.rate_limit_usage is 'The counters of a key, a user or a network address. No row is shared between users.';
alter table public.rate_limit_usage enable row level security;
revoke all on public.rate_limit_usage from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.rate_limit_usage to service_role;

create function public.advance_ring(p_ring bigint[], p_size int, p_now bigint) returns bigint[]
language plpgsql immutable as $$
declare
    v_ring bigint[] := p_ring;
    v_newest bigint := p_ring[2 * p_size + 3];
    v_bucket bigint := v_newest;
    v_slot int;
begin
    if p_ring is null or v_newest >= p_now then
        return v_ring;
    end if;
    if p_now - v_newest >= p_size then
        v_ring := array_fill(0::bigint, array[2 * p_size + 3]);
    else
        while v_bucket < p_now loop -- a for loop counts in integers, which these numbers exceed
            v_bucket := v_bucket + 1;
            v_slot := v_bucket % p_size + 1;
            v_ring[2 * p_size + 1] := v_ring[2 * p_size + 1] - v_ring[v_slot];
            v_ring[2 * p_size + 2] := v_ring[2 * p_size + 2] - v_ring[p_size + v_slot];
            v_ring[v_slot] := 0;
            v_ring[p_size + v_slot] := 0;
        end loop;
    end if;
    v_ring[2 * p_size + 3] := p_now;
    return v_ring;
end $$;
comment on function public.advance_ring is 'The ring with p_now as its newest bucket; a clock that went backwards leaves it as it is.';
revoke all on function public.advance_ring(bigint[], int, bigint) from public, anon, authenticated;
grant execute on function public.advance_ring(bigint[], int, bigint) to service_role;

create function public.count_in_ring(p_ring bigint[], p_size int, p_bucket bigint, p_requests bigint, p_tokens bigint) returns bigint[]
language plpgsql immutable as $$
declare
    v_ring bigint[] := p_ring;
    v_newest bigint := p_ring[2 * p_size + 3];
    v_slot int := least(p_bucket, v_newest) % p_size + 1;
begin
    if p_ring is null or p_bucket <= v_newest - p_size then
        return v_ring;
    end if;
    v_ring[v_slot] := v_ring[v_slot] + p_requests;
    v_ring[p_size + v_slot] := v_ring[p_size + v_slot] + p_tokens;
    v_ring[2 * p_size + 1] := v_ring[2 * p_size + 1] + p_requests;
    v_ring[2 * p_size + 2] := v_ring[2 * p_size + 2] + p_tokens;
    return v_ring;
end $$;
comment on function public.count_in_ring is
    'Counts in one bucket of an advanced ring, null for the newest; a bucket that has left the ring counts no more.';
revoke all on function public.count_in_ring(bigint[], int, bigint, bigint, bigint) from public, anon, authenticated;
grant execute on function public.count_in_ring(bigint[], int, bigint, bigint, bigint) to service_role;

create function public.ring_frees_at(p_ring bigint[], p_size int, p_width_ms bigint, p_offset int, p_excess bigint) returns bigint
language plpgsql immutable as $$
declare
    v_newest bigint := p_ring[2 * p_size + 3];
    v_bucket bigint := v_newest - p_size;
    v_freed bigint := 0;
begin
    while v_bucket < v_newest loop
        v_bucket := v_bucket + 1;
        v_freed := v_freed + p_ring[p_offset + v_bucket % p_size + 1];
        if v_freed >= p_excess then
            return (v_bucket + p_size) * p_width_ms;
        end if;
    end loop;
    return (v_newest + p_size) * p_width_ms;
end $$;
comment on function public.ring_frees_at is
    'When (unix ms) at least p_excess of what was counted will have left the ring; p_offset 0 looks at requests, p_size at tokens.';
revoke all on function public.ring_frees_at(bigint[], int, bigint, int, bigint) from public, anon, authenticated;
grant execute on function public.ring_frees_at(bigint[], int, bigint, int, bigint) to service_role;

-- What the limits say so far: the longest refusal (window is null while there is none), and the tightest limits for the headers.
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

-- Of several refusals the one that lasts longest is told: after its Retry-After none of them stands in the way.
create function public.refuse_until(
    p_state public.limit_state, p_window text, p_unit text, p_limit bigint, p_never boolean, p_frees_at_ms bigint
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
revoke all on function public.refuse_until(public.limit_state, text, text, bigint, boolean, bigint) from public, anon, authenticated;
grant execute on function public.refuse_until(public.limit_state, text, text, bigint, boolean, bigint) to service_role;

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
        v_state := public.refuse_until(v_state, p_window, 'requests', p_requests, p_requests = 0,
                                       public.ring_frees_at(p_ring, p_size, p_width_ms, 0, v_requests + 1 - p_requests));
    end if;
    if v_tokens + p_need > p_tokens then
        v_state := public.refuse_until(v_state, p_window, 'tokens', p_tokens, p_need > p_tokens,
                                       public.ring_frees_at(p_ring, p_size, p_width_ms, p_size, v_tokens + p_need - p_tokens));
    end if;
    if p_requests - v_requests < v_state.request_left or (v_state.request_left is null and p_requests is not null) then
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
revoke all on function public.check_window(public.limit_state, text, bigint[], int, bigint, bigint, bigint, bigint)
    from public, anon, authenticated;
grant execute on function public.check_window(public.limit_state, text, bigint[], int, bigint, bigint, bigint, bigint) to service_role;

create function public.check_limits(
    p_state public.limit_state, p_limits public.rate_limit_configs, p_usage public.rate_limit_usage, p_need bigint
) returns public.limit_state language plpgsql immutable as $$
declare
    v_state public.limit_state := p_state;
begin
    if p_limits.burst is not null then
        v_state := public.check_window(v_state, 'second', p_usage.burst_ring, 11, 100, p_limits.burst, null, p_need);
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
revoke all on function public.check_limits(public.limit_state, public.rate_limit_configs, public.rate_limit_usage, bigint)
    from public, anon, authenticated;
grant execute on function public.check_limits(public.limit_state, public.rate_limit_configs, public.rate_limit_usage, bigint)
    to service_role;

-- One counter of a plan (a UTC day or month): refuses, and takes part in the search for the tightest limit.
create function public.check_plan_counter(
    p_state public.limit_state, p_window text, p_unit text, p_limit bigint, p_used bigint, p_need bigint, p_resets_ms bigint
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
revoke all on function public.check_plan_counter(public.limit_state, text, text, bigint, bigint, bigint, bigint)
    from public, anon, authenticated;
grant execute on function public.check_plan_counter(public.limit_state, text, text, bigint, bigint, bigint, bigint) to service_role;

create function public.check_plan(
    p_state public.limit_state, p_plan public.plans, p_usage public.rate_limit_usage, p_factor numeric, p_need bigint, p_now timestamptz
) returns public.limit_state language plpgsql stable as $$
declare
    v_state public.limit_state := p_state;
    v_day_ends bigint := extract(epoch from (date_trunc('day', p_now, 'UTC') + interval '1 day')) * 1000;
    v_month_ends bigint := extract(epoch from ((date_trunc('month', p_now at time zone 'UTC') + interval '1 month') at time zone 'UTC')) * 1000;
begin
    v_state := public.check_plan_counter(v_state, 'plan day', 'requests', floor(p_plan.daily_request_limit * p_factor)::bigint,
                                         p_usage.plan_day_requests, 1, v_day_ends);
    v_state := public.check_plan_counter(v_state, 'plan day', 'tokens', floor(p_plan.daily_token_limit * p_factor)::bigint,
                                         p_usage.plan_day_tokens, p_need, v_day_ends);
    v_state := public.check_plan_counter(v_state, 'plan month', 'requests', floor(p_plan.monthly_request_limit * p_factor)::bigint,
                                         p_usage.plan_month_requests, 1, v_month_ends);
    v_state := public.check_plan_counter(v_state, 'plan month', 'tokens', floor(p_plan.monthly_token_limit * p_factor)::bigint,
                                         p_usage.plan_month_tokens, p_need, v_month_ends);
    return v_state;
end $$;
revoke all on function public.check_plan(public.limit_state, public.plans, public.rate_limit_usage, numeric, bigint, timestamptz)
    from public, anon, authenticated;
grant execute on function public.check_plan(public.limit_state, public.plans, public.rate_limit_usage, numeric, bigint, timestamptz)
    to service_role;

-- The counters of a subject as of p_now: rings advanced, plan counters of another day or month and a budget of another window emptied.
create function public.advance_usage(p_usage public.rate_limit_usage, p_now timestamptz, p_budget_window text)
returns public.rate_limit_usage language plpgsql stable as $$
declare
    v_usage public.rate_limit_usage := p_usage;
    v_ms bigint := extract(epoch from p_now) * 1000;
    v_day date := (p_now at time zone 'UTC')::date;
    v_month date := date_trunc('month', p_now at time zone 'UTC')::date;
    v_since timestamptz := public.budget_start(p_budget_window, p_now);
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
    if p_budget_window is not null and v_usage.budget_since < v_since then
        v_usage.budget_since := v_since;
        v_usage.budget_spent_nanos := 0;
    end if;
    return v_usage;
end $$;

create function public.budget_start(p_window text, p_now timestamptz) returns timestamptz
language sql stable as $$
    select case p_window
        when 'day' then date_trunc('day', p_now, 'UTC')
        when 'week' then date_trunc('week', p_now, 'UTC')
        when 'month' then date_trunc('month', p_now, 'UTC')
        else '-infinity'::timestamptz
    end
$$;
revoke all on function public.budget_start(text, timestamptz) from public, anon, authenticated;
grant execute on function public.budget_start(text, timestamptz) to service_role;
revoke all on function public.advance_usage(public.rate_limit_usage, timestamptz, text) from public, anon, authenticated;
grant execute on function public.advance_usage(public.rate_limit_usage, timestamptz, text) to service_role;
