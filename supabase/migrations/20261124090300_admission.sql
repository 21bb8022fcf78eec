-- Admission: one call decides for many requests, and a request is admitted only if this could hold an upper bound of its cost.
-- Expected refusals are returned rows. Time is clock_timestamp() after the locks. Every writer locks its users first, in id order.

create function public.scope_allows(p_scopes jsonb, p_verb text, p_resource text) returns boolean
language sql immutable as $$
    select coalesce((p_scopes -> p_verb) ?| array['*', p_resource], false)
$$;
revoke all on function public.scope_allows(jsonb, text, text) from public, anon, authenticated;
grant execute on function public.scope_allows(jsonb, text, text) to service_role;

create function public.domain_allowed(p_allowed text[], p_domain text) returns boolean
language sql immutable as $$
    select coalesce(bool_or(p_domain = d or (d like '*.%' and length(p_domain) > length(d) - 1 and right(p_domain, length(d) - 1) = substr(d, 2))), false)
    from unnest(p_allowed) as d
$$;
comment on function public.domain_allowed is 'Exact, or *.example.com for anything below example.com.';
revoke all on function public.domain_allowed(text[], text) from public, anon, authenticated;
grant execute on function public.domain_allowed(text[], text) to service_role;

create function public.models_allowed(p_allowed text[], p_models text[]) returns boolean
language sql immutable as $$
    select p_allowed is null or coalesce(bool_and(exists (
        select from unnest(p_allowed) as a where a = m or (right(a, 1) = '*' and starts_with(m, left(a, -1)))
    )), true) from unnest(p_models) as m
$$;
comment on function public.models_allowed is 'Every model must be allowed: exact, or a prefix that ends with *; null allows all.';
revoke all on function public.models_allowed(text[], text[]) from public, anon, authenticated;
grant execute on function public.models_allowed(text[], text[]) to service_role;

-- The id of the key with one of these hashes: current, or previous within its grace. A key of an older format that was moved is found
-- by its hash like any other, so that rotating it ends the old secret.
create function public.find_key(p_hashes text[]) returns bigint
language plpgsql stable as $$
declare
    v_id bigint;
begin
    select id into v_id from public.api_keys_new where key_hash = any (p_hashes) limit 1;
    if v_id is null then
        select id into v_id from public.api_keys_new
        where previous_key_hash = any (p_hashes) and previous_valid_until > clock_timestamp() limit 1;
    end if;
    return v_id;
end $$;
revoke all on function public.find_key(text[]) from public, anon, authenticated;
grant execute on function public.find_key(text[]) to service_role;

-- The owner must be locked: then the first of two concurrent first uses moves the key, and the second finds it moved.
create function public.move_legacy_key(p_legacy_hash text, p_hash text, p_secret_id text) returns public.api_keys_new
language plpgsql as $$
declare
    v_old public.api_keys;
    v_key public.api_keys_new;
begin
    select * into v_old from public.api_keys where key_sha256 = p_legacy_hash and moved_to is null for update;
    if not found then
        return null;
    end if;
    insert into public.api_keys_new (user_id, key_name, key_prefix, last4, key_hash, hash_secret_id, environment_tag,
                                     scope_permissions, expiration_date, max_requests, is_active)
    values (v_old.user_id, left(v_old.key_name, 80) || ' (imported ' || v_old.id || ')', v_old.key_prefix, v_old.last4, p_hash, p_secret_id,
            v_old.environment_tag, v_old.scope_permissions, v_old.expiration_date, v_old.max_requests, v_old.is_active)
    returning * into v_key;
    insert into public.rate_limit_usage (subject, subject_id, burst_ring, minute_ring, hour_ring, day_ring)
    values ('key', v_key.id, null, null, null, null);
    update public.api_keys set moved_to = v_key.id where id = v_old.id;
    return v_key;
end $$;
revoke all on function public.move_legacy_key(text, text, text) from public, anon, authenticated;
grant execute on function public.move_legacy_key(text, text, text) to service_role;

-- Locks these users in id order and returns the ids that it locked: all of them, or, where another transaction holds one for longer
-- than lock_timeout, those that are free by then.
create function public.lock_users(p_ids bigint[]) returns bigint[]
language plpgsql set search_path = '' set lock_timeout = '250ms' as $$
declare
    v_locked bigint[];
begin
    begin
        select array_agg(l.id) into v_locked
        from (select u.id from public.users u where u.id = any (p_ids) order by u.id for no key update) as l;
    exception when lock_not_available then
        select array_agg(l.id) into v_locked
        from (select u.id from public.users u where u.id = any (p_ids) order by u.id for no key update skip locked) as l;
    end;
    return coalesce(v_locked, '{}');
end $$;
comment on function public.lock_users is 'A user that stays locked elsewhere must not keep its neighbours in a batch from being served.';
revoke all on function public.lock_users(bigint[]) from public, anon, authenticated;
grant execute on function public.lock_users(bigint[]) to service_role;

-- Writes what refusal_note made: all of a batch at once and in one order, as two batches that met in opposite orders would deadlock.
create function public.note_refusals(p_notes jsonb[]) returns void language sql set search_path = '' as $$
    insert into public.audit_logs as a (actor, action, target, user_id, key_id, ip, user_agent, request_id, refusal_minute, occurrences)
    select n.actor, n.action, 'api', (array_agg(n.user_id))[1], (array_agg(n.key_id))[1], (array_agg(n.ip))[1],
           (array_agg(n.user_agent))[1], (array_agg(n.request_id))[1], date_trunc('minute', clock_timestamp()), count(*)
    from unnest(p_notes) as j, jsonb_to_record(j) as n (actor text, action text, user_id bigint, key_id bigint, ip inet,
                                                        user_agent text, request_id uuid)
    group by n.actor, n.action
    order by n.actor collate "C", n.action collate "C"
    on conflict (actor, action, refusal_minute) where refusal_minute is not null
    do update set occurrences = a.occurrences + excluded.occurrences
$$;
revoke all on function public.note_refusals(jsonb[]) from public, anon, authenticated;
grant execute on function public.note_refusals(jsonb[]) to service_role;

create type public.admission_item as (
    request_id uuid,
    client_request_id text,
    hashes text[],
    secret_id text,
    legacy_hash text,
    prefix_environment text,
    verb text,
    resource text,
    address text,
    domain text,
    user_agent text,
    mode text,
    holds boolean,
    resent boolean,
    endpoint text,
    streamed boolean,
    models text[],
    prompt_estimate bigint,
    fixed_nanos numeric,
    output_nanos numeric,
    min_output bigint,
    max_output bigint,
    markup numeric,
    ttl_seconds int
);
revoke all on type public.admission_item from public, anon, authenticated;
grant usage on type public.admission_item to service_role;

-- A refusal's answer, with what the audit log is to hold of it (`note`, which is taken out before the answer leaves).
create function public.refusal(p_code text, p_item public.admission_item, p_user_id bigint, p_key_id bigint) returns jsonb
language sql stable as $$
    select jsonb_build_object('outcome', p_code, 'note', jsonb_build_object(
        -- Of IPv6 the /64: a host usually owns one whole, and would otherwise write a row for each of its addresses.
        'actor', coalesce('key:' || p_key_id, 'address:' || case family(p_item.address::inet)
            when 6 then network(set_masklen(p_item.address::inet, 64))::text else p_item.address end, 'unknown'), 'action', p_code, 'user_id', p_user_id,
        'key_id', p_key_id, 'ip', p_item.address::inet, 'user_agent', left(p_item.user_agent, 512), 'request_id', p_item.request_id))
$$;
revoke all on function public.refusal(text, public.admission_item, bigint, bigint) from public, anon, authenticated;
grant execute on function public.refusal(text, public.admission_item, bigint, bigint) to service_role;

-- Why this key may not be used for this at all, as a code, or null. Limits and money come later.
create function public.refuse_identity(p_key public.api_keys_new, p_user public.users, p_item public.admission_item, p_now timestamptz)
returns text language plpgsql stable as $$
begin
    -- The prefix chose the upstream, the row decides what is charged: they must agree, and a key of an older format is never a test key.
    if p_key.id is null or p_key.environment_tag <> coalesce(p_item.prefix_environment, p_key.environment_tag)
       or (p_key.environment_tag = 'test') <> (p_item.prefix_environment is not distinct from 'test') then
        return 'INVALID_KEY';
    elsif not p_key.is_active or p_key.revoked_at is not null then
        return 'INACTIVE_KEY';
    elsif p_key.expiration_date <= p_now then
        return 'EXPIRED_KEY';
    elsif p_user.deleted_at is not null then
        return 'INACTIVE_KEY';
    elsif cardinality(p_key.ip_allowlist) > 0 and not coalesce(p_item.address::inet <<= any (p_key.ip_allowlist), false) then
        return 'IP_NOT_ALLOWED';
    elsif cardinality(p_key.domain_referrers) > 0 and not public.domain_allowed(p_key.domain_referrers, p_item.domain) then
        return 'DOMAIN_NOT_ALLOWED';
    elsif not public.scope_allows(p_key.scope_permissions, p_item.verb, p_item.resource)
          or (p_item.verb = 'admin' and p_user.role <> 'admin') then
        return 'SCOPE_NOT_ALLOWED';
    elsif p_key.allowed_models is not null and not public.models_allowed(p_key.allowed_models, p_item.models) then
        return 'MODEL_NOT_ALLOWED';
    elsif not p_user.is_active then
        return 'ACCOUNT_SUSPENDED';
    end if;
    return null;
end $$;
revoke all on function public.refuse_identity(public.api_keys_new, public.users, public.admission_item, timestamptz)
    from public, anon, authenticated;
grant execute on function public.refuse_identity(public.api_keys_new, public.users, public.admission_item, timestamptz) to service_role;

create function public.current_plan(p_user public.users, p_now timestamptz) returns public.plans
language plpgsql stable as $$
declare
    v_plan public.plans;
begin
    select p.* into v_plan from public.user_plans up join public.plans p on p.id = up.plan_id
    where up.user_id = p_user.id and up.is_active and up.start_date <= p_now and p_now < up.end_date limit 1;
    if not found then
        select p.* into v_plan from public.plans p where p.slug = case when p_user.is_funded then 'pay-as-you-go' else 'free' end;
    end if;
    return v_plan;
end $$;
revoke all on function public.current_plan(public.users, timestamptz) from public, anon, authenticated;
grant execute on function public.current_plan(public.users, timestamptz) to service_role;

-- Up to four expired holds of a user, once in ten seconds, and slots and held budget counted anew from the journal.
create function public.recount_user(p_user_id bigint, p_key_id bigint, p_now timestamptz) returns jsonb
language plpgsql as $$
declare
    v_since timestamptz;
    v_expired jsonb;
begin
    select pending_since into v_since from public.rate_limit_usage
    where subject = 'user' and subject_id = p_user_id and recounted_at < p_now - interval '10 seconds';
    if not found then
        return null;
    end if;
    with pending as (
        select r.request_id, r.key_id, r.environment, r.generation_id, r.mode, r.hold_nanos, r.expires_at, r.created_at from public.usage_records r
        where r.user_id = p_user_id and r.created_at >= v_since and r.status = 'pending'
    ), recounted as (
        update public.rate_limit_usage u set recounted_at = p_now,
            pending_since = coalesce((select min(created_at) from pending), p_now),
            slots = (select count(*) from pending),
            test_slots = (select count(*) from pending where environment = 'test')
        where u.subject = 'user' and u.subject_id = p_user_id
    ), recounted_key as (
        update public.rate_limit_usage u set
            slots = (select count(*) from pending where key_id = p_key_id),
            budget_held_nanos = coalesce((select sum(hold_nanos) from pending where key_id = p_key_id), 0)
        where u.subject = 'key' and u.subject_id = p_key_id
    )
    select jsonb_agg(jsonb_build_object('request_id', e.request_id, 'generation_id', e.generation_id, 'mode', e.mode,
                                        'environment', e.environment)) into v_expired
    from (select * from pending where expires_at <= p_now order by random() limit 4) as e;
    return v_expired;
end $$;
comment on function public.recount_user is 'So that a crash leaks neither money nor slots for longer than its hold''s time to live, with no worker running.';
revoke all on function public.recount_user(bigint, bigint, timestamptz) from public, anon, authenticated;
grant execute on function public.recount_user(bigint, bigint, timestamptz) to service_role;

create function public.retry_after_seconds(p_frees_at_ms bigint, p_now timestamptz) returns bigint
language sql immutable as $$
    select greatest(1, ceil((p_frees_at_ms - extract(epoch from p_now) * 1000) / 1000.0))::bigint
$$;
revoke all on function public.retry_after_seconds(bigint, timestamptz) from public, anon, authenticated;
grant execute on function public.retry_after_seconds(bigint, timestamptz) to service_role;

-- The limits' refusal of this request, or the state that allows it.
create function public.check_all_limits(
    p_key public.api_keys_new, p_user public.users, p_plan public.plans, p_key_limits public.rate_limit_configs,
    p_key_usage public.rate_limit_usage,
    p_user_usage public.rate_limit_usage, p_need bigint, p_now timestamptz
) returns public.limit_state language plpgsql stable as $$
declare
    v_state public.limit_state;
    v_limits public.rate_limit_configs;
    v_running bigint := p_user_usage.slots;
begin
    v_state := public.check_plan(v_state, p_plan, p_user_usage,
                                 coalesce((p_plan.environment_factors ->> p_key.environment_tag)::numeric, 1), p_need, p_now);
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
revoke all on function public.check_all_limits(public.api_keys_new, public.users, public.plans, public.rate_limit_configs, public.rate_limit_usage,
    public.rate_limit_usage, bigint, timestamptz) from public, anon, authenticated;
grant execute on function public.check_all_limits(public.api_keys_new, public.users, public.plans, public.rate_limit_configs, public.rate_limit_usage,
    public.rate_limit_usage, bigint, timestamptz) to service_role;

-- How many output tokens this amount covers: p_max if it covers them all, else what it covers (below p_min is a refusal).
create function public.affordable_output(p_item public.admission_item, p_available_nanos bigint) returns bigint
language plpgsql immutable as $$
declare
    v_left numeric;
begin
    if ceil((p_item.fixed_nanos + p_item.output_nanos * p_item.max_output) * p_item.markup) <= p_available_nanos then
        return p_item.max_output;
    end if;
    -- div() is exact where / would round, and a hold that is a nano-dollar too high would break users_never_overdrawn.
    v_left := p_available_nanos - p_item.fixed_nanos * p_item.markup;
    if p_item.output_nanos = 0 or v_left < 0 then
        return -1;
    end if;
    return least(p_item.max_output, div(v_left, p_item.output_nanos * p_item.markup))::bigint;
end $$;
revoke all on function public.affordable_output(public.admission_item, bigint) from public, anon, authenticated;
grant execute on function public.affordable_output(public.admission_item, bigint) to service_role;

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

-- Holds, counts and writes the pending record of a request that nothing refuses.
create function public.record_admission(
    p_item public.admission_item, p_key public.api_keys_new, p_key_usage public.rate_limit_usage, p_user_usage public.rate_limit_usage,
    p_granted bigint, p_hold bigint, p_now timestamptz
) returns void language plpgsql as $$
declare
    v_need bigint := p_item.prompt_estimate;
    v_test int := (p_key.environment_tag = 'test')::int;
begin
    insert into public.usage_records (request_id, client_request_id, user_id, key_id, mode, environment, endpoint, model, prompt_estimate,
                                      output_granted, hold_nanos, markup, streamed, created_at, expires_at)
    values (p_item.request_id, left(p_item.client_request_id, 256), p_key.user_id, p_key.id, p_item.mode, p_key.environment_tag, p_item.endpoint,
            p_item.models[1], v_need, p_granted, p_hold, p_item.markup, p_item.streamed, p_now,
            p_now + make_interval(secs => p_item.ttl_seconds));
    if p_hold > 0 then
        update public.users set held_nanos = held_nanos + p_hold where id = p_key.user_id;
    end if;
    update public.rate_limit_usage set
        burst_ring = public.count_in_ring(p_user_usage.burst_ring, 11, null, 1, v_need),
        minute_ring = public.count_in_ring(p_user_usage.minute_ring, 7, null, 1, v_need),
        hour_ring = public.count_in_ring(p_user_usage.hour_ring, 13, null, 1, v_need),
        day_ring = public.count_in_ring(p_user_usage.day_ring, 25, null, 1, v_need),
        plan_day = p_user_usage.plan_day, plan_day_requests = p_user_usage.plan_day_requests + 1,
        plan_day_tokens = p_user_usage.plan_day_tokens + v_need,
        plan_month = p_user_usage.plan_month, plan_month_requests = p_user_usage.plan_month_requests + 1,
        plan_month_tokens = p_user_usage.plan_month_tokens + v_need,
        slots = slots + 1, test_slots = test_slots + v_test, requests_used = requests_used + 1, last_used_at = p_now,
        pending_since = case when slots = 0 then p_now else least(pending_since, p_now) end
    where subject = 'user' and subject_id = p_key.user_id;
    update public.rate_limit_usage set
        burst_ring = public.count_in_ring(p_key_usage.burst_ring, 11, null, 1, v_need),
        minute_ring = public.count_in_ring(p_key_usage.minute_ring, 7, null, 1, v_need),
        hour_ring = public.count_in_ring(p_key_usage.hour_ring, 13, null, 1, v_need),
        day_ring = public.count_in_ring(p_key_usage.day_ring, 25, null, 1, v_need),
        slots = slots + 1, requests_used = requests_used + 1, last_used_at = p_now,
        budget_since = p_key_usage.budget_since, budget_spent_nanos = p_key_usage.budget_spent_nanos,
        budget_held_nanos = budget_held_nanos + p_hold
    where subject = 'key' and subject_id = p_key.id;
end $$;
revoke all on function public.record_admission(public.admission_item, public.api_keys_new, public.rate_limit_usage,
    public.rate_limit_usage, bigint, bigint, timestamptz) from public, anon, authenticated;
grant execute on function public.record_admission(public.admission_item, public.api_keys_new, public.rate_limit_usage,
    public.rate_limit_usage, bigint, bigint, timestamptz) to service_role;

create function public.refuse_for_limits(p_item public.admission_item, p_key public.api_keys_new, p_state public.limit_state, p_now timestamptz)
returns jsonb language plpgsql as $$
begin
    return jsonb_build_object(
        'outcome', case when p_state.refused_window = 'concurrency' then 'concurrency'
                        when p_state.refused_window like 'plan %' then 'plan_limit' else 'rate_limit' end,
        'window', p_state.refused_window, 'unit', p_state.refused_unit, 'limit', p_state.refused_limit,
        'need', p_item.prompt_estimate, 'never', p_state.never, 'retry_after', public.retry_after_seconds(p_state.frees_at_ms, p_now),
        'limits', public.limits_json(p_state, p_now),
        'expired', case when p_state.refused_window = 'concurrency' then public.recount_user(p_key.user_id, p_key.id, p_now) end);
end $$;
revoke all on function public.refuse_for_limits(public.admission_item, public.api_keys_new, public.limit_state, timestamptz)
    from public, anon, authenticated;
grant execute on function public.refuse_for_limits(public.admission_item, public.api_keys_new, public.limit_state, timestamptz)
    to service_role;

-- The answer to a request that passed the identity checks: limits, budget and credits decide, in this order.
create function public.admit_checked(p_item public.admission_item, p_key public.api_keys_new, p_user public.users, p_now timestamptz)
returns jsonb language plpgsql as $$
declare
    v_key_usage public.rate_limit_usage;
    v_key_limits public.rate_limit_configs;
    v_user_usage public.rate_limit_usage;
    v_plan public.plans := public.current_plan(p_user, p_now);
    v_state public.limit_state;
    v_free boolean := p_key.environment_tag = 'test';
    v_budget bigint;
    v_available bigint := p_user.credits_nanos - p_user.held_nanos;
    v_granted bigint := p_item.max_output;
    v_hold bigint := 0;
begin
    select * into v_user_usage from public.rate_limit_usage where subject = 'user' and subject_id = p_user.id;
    if not found then -- without counters nothing would be limited
        insert into public.rate_limit_usage (subject, subject_id) values ('user', p_user.id) returning * into v_user_usage;
    end if;
    select * into v_key_usage from public.rate_limit_usage where subject = 'key' and subject_id = p_key.id;
    if not found then
        insert into public.rate_limit_usage (subject, subject_id, burst_ring, minute_ring, hour_ring, day_ring)
        values ('key', p_key.id, null, null, null, null)
        returning * into v_key_usage;
    end if;
    select * into v_key_limits from public.rate_limit_configs where subject = 'key' and subject_id = p_key.id;
    if found and v_key_usage.day_ring is null then
        v_key_usage.burst_ring := public.empty_ring(11);
        v_key_usage.minute_ring := public.empty_ring(7);
        v_key_usage.hour_ring := public.empty_ring(13);
        v_key_usage.day_ring := public.empty_ring(25);
    end if;
    v_user_usage := public.advance_usage(v_user_usage, p_now, null);
    v_key_usage := public.advance_usage(v_key_usage, p_now, p_key.budget_window);
    if v_key_usage.requests_used >= p_key.max_requests then
        return public.refusal('REQUEST_LIMIT_EXCEEDED', p_item, p_user.id, p_key.id) || jsonb_build_object('limit', p_key.max_requests);
    elsif v_plan.allowed_models is not null and not public.models_allowed(v_plan.allowed_models, p_item.models) then
        return jsonb_build_object('outcome', 'MODEL_NOT_ALLOWED');
    elsif not v_free and p_user.subscription_status = 'trial' and p_user.trial_expires_at <= p_now then
        return jsonb_build_object('outcome', 'trial_expired');
    end if;
    v_state := public.check_all_limits(p_key, p_user, v_plan, v_key_limits, v_key_usage, v_user_usage, p_item.prompt_estimate, p_now);
    if v_state.refused_window is not null then
        return public.refuse_for_limits(p_item, p_key, v_state, p_now);
    end if;
    if not v_free then
        v_budget := p_key.budget_nanos - v_key_usage.budget_spent_nanos - v_key_usage.budget_held_nanos;
        v_granted := public.affordable_output(p_item, greatest(0, least(v_available, v_budget)));
        if v_granted < p_item.min_output then
            return jsonb_build_object(
                'outcome', case when v_budget < v_available then 'budget' else 'credits' end,
                'needed_nanos', ceil((p_item.fixed_nanos + p_item.output_nanos * p_item.min_output) * p_item.markup),
                'available_nanos', greatest(0, least(v_available, v_budget)), 'balance_nanos', p_user.credits_nanos,
                'held_nanos', p_user.held_nanos, 'affordable_output', greatest(0, v_granted),
                'limits', public.limits_json(v_state, p_now),
                'expired', case when p_user.held_nanos > 0 then public.recount_user(p_user.id, p_key.id, p_now) end);
        end if;
        v_hold := ceil((p_item.fixed_nanos + p_item.output_nanos * v_granted) * p_item.markup);
    end if;
    perform public.record_admission(p_item, p_key, v_key_usage, v_user_usage, v_granted, v_hold, p_now);
    v_state.request_left := v_state.request_left - 1;
    v_state.token_left := v_state.token_left - p_item.prompt_estimate;
    return jsonb_build_object('outcome', 'admitted', 'user_id', p_user.id, 'key_id', p_key.id, 'environment', p_key.environment_tag,
                              'granted_output', v_granted, 'hold_nanos', v_hold, 'balance_nanos', p_user.credits_nanos,
                              'limits', public.limits_json(v_state, p_now));
end $$;
revoke all on function public.admit_checked(public.admission_item, public.api_keys_new, public.users, timestamptz)
    from public, anon, authenticated;
grant execute on function public.admit_checked(public.admission_item, public.api_keys_new, public.users, timestamptz) to service_role;

create function public.repeat_admission(p_item public.admission_item) returns jsonb
language sql stable as $$
    select jsonb_build_object('outcome', 'admitted', 'user_id', r.user_id, 'key_id', r.key_id, 'environment', r.environment,
                              'granted_output', r.output_granted, 'hold_nanos', r.hold_nanos, 'balance_nanos', u.credits_nanos,
                              'limits', '{}'::jsonb)
    from public.usage_records r join public.users u on u.id = r.user_id
    where r.request_id = p_item.request_id and r.key_id = public.find_key(p_item.hashes)
$$;
comment on function public.repeat_admission is 'The first answer to a request id that was sent before, when its reply was lost.';
revoke all on function public.repeat_admission(public.admission_item) from public, anon, authenticated;
grant execute on function public.repeat_admission(public.admission_item) to service_role;

create function public.admit_one(p_item public.admission_item, p_locked bigint[]) returns jsonb
language plpgsql as $$
declare
    v_now timestamptz := clock_timestamp();
    v_key public.api_keys_new;
    v_user public.users;
    v_owner bigint;
    v_refusal text;
    v_answer jsonb;
begin
    if p_item.resent then
        v_answer := public.repeat_admission(p_item);
        if v_answer is not null then
            return v_answer;
        end if;
    end if;
    select * into v_key from public.api_keys_new where id = public.find_key(p_item.hashes);
    if not found and p_item.legacy_hash is not null then
        select user_id into v_owner from public.api_keys where key_sha256 = p_item.legacy_hash and moved_to is null;
        if v_owner = any (p_locked) then
            v_key := public.move_legacy_key(p_item.legacy_hash, p_item.hashes[1], p_item.secret_id);
        end if;
    end if;
    v_owner := coalesce(v_key.user_id, v_owner);
    if v_owner is not null and v_owner <> all (p_locked) then
        return jsonb_build_object('outcome', 'busy');
    end if;
    select * into v_user from public.users where id = v_key.user_id;
    if not exists (select from public.gateway_state where mode = p_item.mode) then
        return jsonb_build_object('outcome', 'wrong_mode');
    end if;
    v_refusal := public.refuse_identity(v_key, v_user, p_item, v_now);
    if v_refusal is not null then
        return public.refusal(v_refusal, p_item, v_user.id, v_key.id);
    end if;
    if v_key.hash_secret_id <> p_item.secret_id and v_key.key_hash = any (p_item.hashes) then
        update public.api_keys_new set key_hash = p_item.hashes[1], hash_secret_id = p_item.secret_id where id = v_key.id;
    end if;
    if p_item.holds then
        return public.admit_checked(p_item, v_key, v_user, v_now);
    end if;
    return jsonb_build_object('outcome', 'verified', 'user_id', v_user.id, 'key_id', v_key.id, 'environment', v_key.environment_tag,
                              'role', v_user.role, 'outdated', v_key.key_hash <> all (p_item.hashes), 'key_name', v_key.key_name, 'key_prefix', v_key.key_prefix, 'last4', v_key.last4,
                              'scopes', v_key.scope_permissions);
end $$;
revoke all on function public.admit_one(public.admission_item, bigint[]) from public, anon, authenticated;
grant execute on function public.admit_one(public.admission_item, bigint[]) to service_role;

-- The users whose keys these items present, before anything is known to be well-formed.
create function public.admission_users(p_items jsonb) returns bigint[] language sql stable as $$
    select array_agg(coalesce(
        (select n.user_id from public.api_keys_new n where n.id = public.find_key(h.hashes) limit 1),
        (select l.user_id from public.api_keys l where l.key_sha256 = i ->> 'legacy_hash' and l.moved_to is null limit 1)))
    from jsonb_array_elements(p_items) as i, lateral (
        select case jsonb_typeof(i -> 'hashes') when 'array' then array(select jsonb_array_elements_text(i -> 'hashes')) end as hashes
    ) as h
$$;
revoke all on function public.admission_users(jsonb) from public, anon, authenticated;
grant execute on function public.admission_users(jsonb) to service_role;

create function public.admit_requests(p_items jsonb) returns jsonb
language plpgsql set search_path = '' as $$
declare
    v_locked bigint[] := public.lock_users(public.admission_users(p_items));
    v_raw jsonb;
    v_answer jsonb;
    v_answers jsonb[] := '{}';
    v_notes jsonb[] := '{}';
begin
    for v_raw in select i from jsonb_array_elements(p_items) as i loop
        begin
            v_answer := public.admit_one(jsonb_populate_record(null::public.admission_item, v_raw), v_locked);
        exception when others then
            v_answer := jsonb_build_object('outcome', 'failed', 'sqlstate', sqlstate, 'message', sqlerrm);
        end;
        if v_answer ? 'note' then
            v_notes := v_notes || (v_answer -> 'note');
        end if;
        v_answers := v_answers || (v_answer - 'note' || jsonb_build_object('request_id', v_raw -> 'request_id'));
    end loop;
    if cardinality(v_notes) > 0 then
        perform public.note_refusals(v_notes);
    end if;
    return to_jsonb(v_answers);
end $$;
comment on function public.admit_requests is
    'Decides for each item (admission_item) in order. Answers carry request_id and outcome: admitted, verified, busy, wrong_mode, failed, '
    'or the code of a refusal.';
revoke all on function public.admit_requests(jsonb) from public, anon, authenticated;
grant execute on function public.admit_requests(jsonb) to service_role;
