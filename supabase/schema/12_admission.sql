-- Admission: one call decides for many requests. A request is admitted only if an upper bound of its cost
-- could be held.
--
-- admit_requests -> admit_one (identity, repetition) -> admit_checked (limits, cache, budgets, credits) ->
-- record_admission.
-- What a request does not use costs it nothing: a table is looked at only when the item, or a row that is
-- read anyway, says so.

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
    ttl_seconds int,
    end_user text,
    price_basis jsonb,
    idempotency jsonb,
    cache jsonb,
    byok boolean
);
comment on type public.admission_item is
    'idempotency: {place, fingerprint, ttl_seconds}. cache: {place, fingerprint, ttl_seconds, clear}; '
    'without ttl_seconds the key''s own cache_ttl_seconds decides, and none means no cache. The answer''s '
    'cache_ttl is what applies; without `cache` it is the key''s own. byok: this instance sends under a '
    'user''s own upstream key where there is one; one of an older release does not, and pays for what it '
    'sends.';
revoke all on type public.admission_item from public, anon, authenticated;
grant usage on type public.admission_item to service_role;

-- Refusals
-- --------

-- A refusal's answer, with what the audit log is to hold of it (`note`, which is taken out before the answer
-- is returned).
create function public.refusal(
    p_code text, p_item public.admission_item, p_user_id bigint, p_key_id bigint
) returns jsonb language sql stable as $$
    select jsonb_build_object('outcome', p_code, 'note', jsonb_build_object(
        -- An IPv6 address counts as its /64: a host usually owns a whole one, and would otherwise write a row
        -- for each of its addresses.
        'actor', coalesce('key:' || p_key_id, 'address:' || case family(p_item.address::inet)
            when 6 then network(set_masklen(p_item.address::inet, 64))::text else p_item.address end,
            'unknown'),
        'action', p_code, 'user_id', p_user_id, 'key_id', p_key_id, 'ip', p_item.address::inet,
        'user_agent', left(p_item.user_agent, 512), 'request_id', p_item.request_id))
$$;
revoke all on function public.refusal(text, public.admission_item, bigint, bigint)
    from public, anon, authenticated;
grant execute on function public.refusal(text, public.admission_item, bigint, bigint) to service_role;

-- Why this key may not be used for this at all, as a code, or null. Limits and money come later.
create function public.refuse_identity(
    p_key public.api_keys_new, p_user public.users, p_item public.admission_item, p_now timestamptz
) returns text language plpgsql stable as $$
begin
    -- The prefix chose the upstream, and the row decides what is charged: they must agree. A key of an older
    -- format is never a test key.
    if p_key.id is null or p_key.environment_tag <> coalesce(p_item.prefix_environment, p_key.environment_tag)
       or (p_key.environment_tag = 'test') <> (p_item.prefix_environment is not distinct from 'test') then
        return 'INVALID_KEY';
    elsif not p_key.is_active or p_key.revoked_at is not null then
        return 'INACTIVE_KEY';
    elsif p_key.expiration_date <= p_now then
        return 'EXPIRED_KEY';
    elsif p_user.deleted_at is not null then
        return 'INACTIVE_KEY';
    elsif cardinality(p_key.ip_allowlist) > 0
          and not coalesce(p_item.address::inet <<= any (p_key.ip_allowlist), false) then
        return 'IP_NOT_ALLOWED';
    elsif cardinality(p_key.domain_referrers) > 0
          and not public.domain_allowed(p_key.domain_referrers, p_item.domain) then
        return 'DOMAIN_NOT_ALLOWED';
    elsif not public.scope_allows(p_key.scope_permissions, p_item.verb, p_item.resource)
          or (p_item.verb = 'admin' and p_user.role <> 'admin') then
        return 'SCOPE_NOT_ALLOWED';
    elsif p_key.allowed_models is not null
          and not public.models_allowed(p_key.allowed_models, p_item.models) then
        return 'MODEL_NOT_ALLOWED';
    elsif not p_user.is_active then
        return 'ACCOUNT_SUSPENDED';
    end if;
    return null;
end $$;
revoke all on function public.refuse_identity(
    public.api_keys_new, public.users, public.admission_item, timestamptz
) from public, anon, authenticated;
grant execute on function public.refuse_identity(
    public.api_keys_new, public.users, public.admission_item, timestamptz
) to service_role;

-- Where slots are the reason, expired holds are handed out as well: settling them frees slots.
create function public.refuse_for_limits(
    p_item public.admission_item, p_key public.api_keys_new, p_state public.limit_state, p_now timestamptz
) returns jsonb language plpgsql as $$
begin
    return jsonb_build_object(
        'outcome', case when p_state.refused_window = 'concurrency' then 'concurrency'
                        when p_state.refused_window like 'plan %' then 'plan_limit' else 'rate_limit' end,
        'window', p_state.refused_window, 'unit', p_state.refused_unit, 'limit', p_state.refused_limit,
        'need', p_item.prompt_estimate, 'never', p_state.never,
        'retry_after', public.retry_after_seconds(p_state.frees_at_ms, p_now),
        'limits', public.limits_json(p_state, p_now),
        'expired', case when p_state.refused_window = 'concurrency'
                        then public.recount_user(p_key.user_id, p_key.id, p_item.end_user, p_now) end);
end $$;
revoke all on function public.refuse_for_limits(
    public.admission_item, public.api_keys_new, public.limit_state, timestamptz
) from public, anon, authenticated;
grant execute on function public.refuse_for_limits(
    public.admission_item, public.api_keys_new, public.limit_state, timestamptz
) to service_role;

-- The refusal of a request that the least of credits, key's budget and end user's budget does not cover.
create function public.refuse_for_money(
    p_item public.admission_item, p_credits bigint, p_held bigint, p_available bigint, p_budget bigint,
    p_end_user_left bigint, p_granted bigint
) returns jsonb language plpgsql stable as $$
begin
    return jsonb_build_object(
        'outcome', case when p_end_user_left < least(p_available, p_budget) then 'end_user_budget'
                        when p_budget < p_available then 'budget' else 'credits' end,
        'needed_nanos', ceil((p_item.fixed_nanos + p_item.output_nanos * p_item.min_output) * p_item.markup),
        'available_nanos', greatest(0, least(p_available, p_budget, p_end_user_left)),
        'balance_nanos', p_credits, 'held_nanos', p_held, 'affordable_output', greatest(0, p_granted));
end $$;
revoke all on function public.refuse_for_money(
    public.admission_item, bigint, bigint, bigint, bigint, bigint, bigint
) from public, anon, authenticated;
grant execute on function public.refuse_for_money(
    public.admission_item, bigint, bigint, bigint, bigint, bigint, bigint
) to service_role;

-- How many output tokens this amount covers: max_output if it covers them all, else as many as it does. Below
-- min_output the request is refused.
create function public.affordable_output(
    p_item public.admission_item, p_available_nanos bigint
) returns bigint language plpgsql immutable as $$
declare
    v_left numeric;
begin
    if ceil((p_item.fixed_nanos + p_item.output_nanos * p_item.max_output) * p_item.markup)
       <= p_available_nanos then
        return p_item.max_output;
    end if;
    -- div() is exact where / would round: a hold that is one nano-dollar too high would break
    -- users_never_overdrawn.
    v_left := p_available_nanos - p_item.fixed_nanos * p_item.markup;
    if p_item.output_nanos = 0 or v_left < 0 then
        return -1;
    end if;
    return least(p_item.max_output, div(v_left, p_item.output_nanos * p_item.markup))::bigint;
end $$;
revoke all on function public.affordable_output(public.admission_item, bigint)
    from public, anon, authenticated;
grant execute on function public.affordable_output(public.admission_item, bigint) to service_role;

-- Decision
-- --------

-- The users whose keys these items present. Runs before anything is known to be well-formed.
create function public.admission_users(p_items jsonb) returns bigint[] language sql stable as $$
    select array_agg(coalesce(
        (select n.user_id from public.api_keys_new n where n.id = public.find_key(h.hashes) limit 1),
        (select l.user_id from public.api_keys l
         where l.key_sha256 = i ->> 'legacy_hash' and l.moved_to is null limit 1)))
    from jsonb_array_elements(p_items) as i, lateral (
        select case jsonb_typeof(i -> 'hashes')
               when 'array' then array(select jsonb_array_elements_text(i -> 'hashes')) end as hashes
    ) as h
$$;
revoke all on function public.admission_users(jsonb) from public, anon, authenticated;
grant execute on function public.admission_users(jsonb) to service_role;

create function public.admit_requests(p_items jsonb) returns jsonb language plpgsql set search_path = '' as $$
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
        exception when others then -- one bad item must not refuse its neighbours in the batch
            v_answer := jsonb_build_object('outcome', 'failed', 'sqlstate', sqlstate, 'message', sqlerrm);
        end;
        if v_answer ? 'note' then
            v_notes := v_notes || (v_answer -> 'note');
        end if;
        v_answers := v_answers
            || (v_answer - 'note' || jsonb_build_object('request_id', v_raw -> 'request_id'));
    end loop;
    if cardinality(v_notes) > 0 then
        perform public.note_refusals(v_notes);
    end if;
    return to_jsonb(v_answers);
end $$;
comment on function public.admit_requests is
    'Decides for each item (admission_item) in order. Answers carry request_id and outcome: admitted, '
    'cached, replayed, verified, busy, wrong_mode, failed, or the code of a refusal.';
revoke all on function public.admit_requests(jsonb) from public, anon, authenticated;
grant execute on function public.admit_requests(jsonb) to service_role;

-- Identity, repetition and idempotency of one item. An owner who is not among p_locked is busy.
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
        select user_id into v_owner from public.api_keys
        where key_sha256 = p_item.legacy_hash and moved_to is null;
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
    -- A key that is still hashed under an older secret moves to the current one as it is used.
    if v_key.hash_secret_id <> p_item.secret_id and v_key.key_hash = any (p_item.hashes) then
        update public.api_keys_new set key_hash = p_item.hashes[1], hash_secret_id = p_item.secret_id
        where id = v_key.id;
    end if;
    if p_item.holds then
        if p_item.idempotency is null then
            return public.admit_checked(p_item, v_key, v_user, v_now);
        end if;
        v_answer := public.check_idempotency(p_item, v_key, v_now);
        if v_answer is null then
            v_answer := public.admit_checked(p_item, v_key, v_user, v_now);
            if v_answer ->> 'outcome' in ('admitted', 'cached') then -- a refusal leaves the key free
                perform public.claim_idempotency(p_item, v_user.id, v_answer ->> 'answer', v_now);
            end if;
        end if;
        return v_answer;
    end if;
    return jsonb_build_object(
        'outcome', 'verified', 'user_id', v_user.id, 'key_id', v_key.id, 'environment', v_key.environment_tag,
        'role', v_user.role, 'outdated', v_key.key_hash <> all (p_item.hashes), 'key_name', v_key.key_name,
        'key_prefix', v_key.key_prefix, 'last4', v_key.last4, 'scopes', v_key.scope_permissions,
        'limits', public.verified_limits(v_key, v_user, v_now));
end $$;
revoke all on function public.admit_one(public.admission_item, bigint[]) from public, anon, authenticated;
grant execute on function public.admit_one(public.admission_item, bigint[]) to service_role;

-- The answer to a request that passed the identity checks: limits, cache, budgets and credits decide, in this
-- order.
create function public.admit_checked(
    p_item public.admission_item, p_key public.api_keys_new, p_user public.users, p_now timestamptz
) returns jsonb language plpgsql as $$
declare
    v_key_usage public.rate_limit_usage;
    v_key_limits public.rate_limit_configs;
    v_user_usage public.rate_limit_usage;
    v_plan public.plans := public.current_plan(p_user, p_now);
    v_state public.limit_state;
    v_test boolean := p_key.environment_tag = 'test';
    v_provider_key text;
    v_cache_ttl int := p_key.cache_ttl_seconds;
    v_cached public.stored_answers;
    v_budget bigint;
    v_end_user_left bigint;
    v_available bigint := p_user.credits_nanos - p_user.held_nanos;
    v_granted bigint := p_item.max_output;
    v_hold bigint := 0;
    v_answer jsonb;
begin
    select * into v_user_usage from public.rate_limit_usage where subject = 'user' and subject_id = p_user.id;
    if not found then -- without counters nothing would be limited
        insert into public.rate_limit_usage (subject, subject_id) values ('user', p_user.id)
        returning * into v_user_usage;
    end if;
    select * into v_key_usage from public.rate_limit_usage where subject = 'key' and subject_id = p_key.id;
    if not found then
        insert into public.rate_limit_usage (
            subject, subject_id, burst_ring, minute_ring, hour_ring, day_ring)
        values ('key', p_key.id, null, null, null, null)
        returning * into v_key_usage;
    end if;
    select * into v_key_limits from public.rate_limit_configs where subject = 'key' and subject_id = p_key.id;
    -- A key without limits has no rings; from its first limit on they count.
    if found and v_key_usage.day_ring is null then
        v_key_usage.burst_ring := public.empty_ring(11);
        v_key_usage.minute_ring := public.empty_ring(7);
        v_key_usage.hour_ring := public.empty_ring(13);
        v_key_usage.day_ring := public.empty_ring(25);
    end if;
    v_user_usage := public.advance_usage(v_user_usage, p_now, null);
    v_key_usage := public.advance_usage(v_key_usage, p_now, p_key.budget_window);
    if v_key_usage.requests_used >= p_key.max_requests then
        return public.refusal('REQUEST_LIMIT_EXCEEDED', p_item, p_user.id, p_key.id)
            || jsonb_build_object('limit', p_key.max_requests);
    elsif v_plan.allowed_models is not null
          and not public.models_allowed(v_plan.allowed_models, p_item.models) then
        return jsonb_build_object('outcome', 'MODEL_NOT_ALLOWED');
    elsif not v_test and p_user.subscription_status = 'trial' and p_user.trial_expires_at <= p_now then
        return jsonb_build_object('outcome', 'trial_expired');
    end if;
    if p_item.cache is not null then
        v_cache_ttl := coalesce((p_item.cache ->> 'ttl_seconds')::int, v_cache_ttl);
        if v_cache_ttl is not null then
            v_cached := public.find_cached(p_item.cache, p_user.id, p_now);
        end if;
    end if;
    -- A cached answer counts as a request, and as no tokens.
    v_state := public.check_all_limits(
        p_key, p_user, v_plan, v_key_limits, v_key_usage, v_user_usage,
        case when v_cached.id is null then p_item.prompt_estimate else 0 end, p_now);
    if v_state.refused_window is not null then
        return public.refuse_for_limits(p_item, p_key, v_state, p_now);
    end if;
    v_state.request_left := v_state.request_left - 1;
    if v_cached.id is not null then
        perform public.record_admission(
            p_item, p_key, v_key_usage, v_user_usage, 0, 0, false, false, p_user.credits_nanos, p_now);
        return public.cached_json(v_cached, p_now) || jsonb_build_object(
            'user_id', p_user.id, 'key_id', p_key.id, 'environment', p_key.environment_tag,
            'status', 'completed', 'cost_nanos', 0, 'balance_after_nanos', p_user.credits_nanos,
            'limits', public.limits_json(v_state, p_now));
    end if;
    if p_user.has_provider_key and p_item.byok and not v_test then
        select encrypted_key into v_provider_key from public.provider_keys
        where user_id = p_user.id and is_active;
    end if;
    -- Test requests and those under the user's own upstream key hold nothing.
    if not v_test and v_provider_key is null then
        v_budget := p_key.budget_nanos - v_key_usage.budget_spent_nanos - v_key_usage.budget_held_nanos;
        if p_user.has_end_user_budgets and p_item.end_user is not null then
            v_end_user_left := public.end_user_left(p_user.id, p_item.end_user, p_now);
        end if;
        -- Budgets that do not exist are null, which least() passes over.
        v_granted := public.affordable_output(
            p_item, greatest(0, least(v_available, v_budget, v_end_user_left)));
        if v_granted < p_item.min_output then
            return public.refuse_for_money(
                p_item, p_user.credits_nanos, p_user.held_nanos, v_available, v_budget, v_end_user_left,
                v_granted)
                || jsonb_build_object(
                    'limits', public.limits_json(v_state, p_now),
                    'expired', case when p_user.held_nanos > 0 then
                        public.recount_user(p_user.id, p_key.id, p_item.end_user, p_now) end);
        end if;
        v_hold := ceil((p_item.fixed_nanos + p_item.output_nanos * v_granted) * p_item.markup);
    end if;
    perform public.record_admission(
        p_item, p_key, v_key_usage, v_user_usage, v_granted, v_hold, v_provider_key is not null,
        v_end_user_left is not null, null, p_now);
    v_state.token_left := v_state.token_left - p_item.prompt_estimate;
    v_answer := jsonb_build_object(
        'outcome', 'admitted', 'user_id', p_user.id, 'key_id', p_key.id, 'environment', p_key.environment_tag,
        'granted_output', v_granted, 'hold_nanos', v_hold, 'balance_nanos', p_user.credits_nanos,
        'limits', public.limits_json(v_state, p_now));
    if v_provider_key is not null then
        v_answer := v_answer || jsonb_build_object('byok', true, 'provider_key', v_provider_key);
    end if;
    if v_cache_ttl is not null then
        v_answer := v_answer || jsonb_build_object('cache_ttl', v_cache_ttl);
    end if;
    return v_answer;
end $$;
revoke all on function public.admit_checked(
    public.admission_item, public.api_keys_new, public.users, timestamptz
) from public, anon, authenticated;
grant execute on function public.admit_checked(
    public.admission_item, public.api_keys_new, public.users, timestamptz
) to service_role;

-- Counts and records a request that nothing refuses: pending with its hold or, with an answer from the cache,
-- completed at no cost and no tokens.
create function public.record_admission(
    p_item public.admission_item, p_key public.api_keys_new, p_key_usage public.rate_limit_usage,
    p_user_usage public.rate_limit_usage, p_granted bigint, p_hold bigint, p_byok boolean,
    p_end_user_budget boolean, p_cached_balance bigint, p_now timestamptz
) returns void language plpgsql as $$
declare
    v_cached boolean := p_cached_balance is not null;
    v_need bigint := case when v_cached then 0 else p_item.prompt_estimate end;
    v_slot int := (not v_cached)::int;
    v_none bigint := case when v_cached then 0 end;
begin
    insert into public.usage_records (
        request_id, client_request_id, user_id, key_id, mode, environment, endpoint, model, prompt_estimate,
        output_granted, hold_nanos, markup, streamed, created_at, expires_at, end_user, byok, price_basis,
        has_idempotency_key, has_end_user_budget, cache_hit, status, settlement_source, settled_at,
        balance_after_nanos, prompt_tokens, completion_tokens, upstream_cost_nanos)
    values (p_item.request_id, left(p_item.client_request_id, 256), p_key.user_id, p_key.id, p_item.mode,
            p_key.environment_tag, p_item.endpoint, p_item.models[1], v_need, p_granted, p_hold,
            p_item.markup, p_item.streamed, p_now, p_now + make_interval(secs => p_item.ttl_seconds),
            p_item.end_user, p_byok, p_item.price_basis, p_item.idempotency is not null, p_end_user_budget,
            v_cached, case when v_cached then 'completed' else 'pending' end,
            case when v_cached then 'usage' end, case when v_cached then p_now end, p_cached_balance,
            v_none, v_none, v_none);
    if p_hold > 0 then
        update public.users set held_nanos = held_nanos + p_hold where id = p_key.user_id;
        if p_end_user_budget then
            perform public.hold_for_end_user(p_key.user_id, p_item.end_user, p_hold);
        end if;
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
        slots = slots + v_slot,
        test_slots = test_slots + case when p_key.environment_tag = 'test' then v_slot else 0 end,
        requests_used = requests_used + 1, last_used_at = p_now,
        pending_since = case when slots = 0 then p_now else least(pending_since, p_now) end
    where subject = 'user' and subject_id = p_key.user_id;
    update public.rate_limit_usage set
        burst_ring = public.count_in_ring(p_key_usage.burst_ring, 11, null, 1, v_need),
        minute_ring = public.count_in_ring(p_key_usage.minute_ring, 7, null, 1, v_need),
        hour_ring = public.count_in_ring(p_key_usage.hour_ring, 13, null, 1, v_need),
        day_ring = public.count_in_ring(p_key_usage.day_ring, 25, null, 1, v_need),
        slots = slots + v_slot, requests_used = requests_used + 1, last_used_at = p_now,
        budget_since = p_key_usage.budget_since, budget_spent_nanos = p_key_usage.budget_spent_nanos,
        budget_level = p_key_usage.budget_level, budget_held_nanos = budget_held_nanos + p_hold
    where subject = 'key' and subject_id = p_key.id;
end $$;
revoke all on function public.record_admission(
    public.admission_item, public.api_keys_new, public.rate_limit_usage, public.rate_limit_usage, bigint,
    bigint, boolean, boolean, bigint, timestamptz
) from public, anon, authenticated;
grant execute on function public.record_admission(
    public.admission_item, public.api_keys_new, public.rate_limit_usage, public.rate_limit_usage, bigint,
    bigint, boolean, boolean, bigint, timestamptz
) to service_role;

-- A request whose answer was lost is sent again under its id, and gets the first decision.
create function public.repeat_admission(p_item public.admission_item) returns jsonb
language plpgsql stable as $$
declare
    v_record public.usage_records;
    v_cached public.stored_answers;
    v_answer jsonb;
begin
    select * into v_record from public.usage_records
    where request_id = p_item.request_id and key_id = public.find_key(p_item.hashes);
    if not found then
        return null;
    end if;
    v_answer := jsonb_build_object(
        'outcome', 'admitted', 'user_id', v_record.user_id, 'key_id', v_record.key_id,
        'environment', v_record.environment, 'granted_output', v_record.output_granted,
        'hold_nanos', v_record.hold_nanos, 'limits', '{}'::jsonb,
        'balance_nanos', (select u.credits_nanos from public.users u where u.id = v_record.user_id));
    if v_record.cache_hit then
        select * into v_cached from public.stored_answers
        where user_id = v_record.user_id and kind = 'cache' and place = p_item.cache ->> 'place';
        if not found then
            -- The answer was cleared within moments: the request is settled, and its id can get nothing more.
            return jsonb_build_object('outcome', 'busy');
        end if;
        return v_answer || public.cached_json(v_cached, clock_timestamp())
            || jsonb_build_object(
                'status', 'completed', 'cost_nanos', 0, 'balance_after_nanos', v_record.balance_after_nanos);
    end if;
    if v_record.byok then
        v_answer := v_answer || public.hold_json(v_record);
    end if;
    return v_answer || (select jsonb_strip_nulls(jsonb_build_object(
        'cache_ttl', coalesce((p_item.cache ->> 'ttl_seconds')::int, k.cache_ttl_seconds)))
        from public.api_keys_new k where k.id = v_record.key_id);
end $$;
comment on function public.repeat_admission is
    'The first answer to a request id that was sent before, when its reply was lost.';
revoke all on function public.repeat_admission(public.admission_item) from public, anon, authenticated;
grant execute on function public.repeat_admission(public.admission_item) to service_role;

-- Quotes
-- ------

-- What admission would say to this request now, as far as money and the lasting rules go. Nothing is counted,
-- held or locked. Rate limits are left out: they change within moments.
-- p: user_id, key_id, models, end_user, and the amounts of an admission_item.
-- Outcomes: granted, credits, budget, end_user_budget, MODEL_NOT_ALLOWED, REQUEST_LIMIT_EXCEEDED,
-- trial_expired, not_found.
create function public.quote_request(p jsonb) returns jsonb language plpgsql stable set search_path = '' as $$
declare
    v_now timestamptz := clock_timestamp();
    v_item public.admission_item :=
        jsonb_populate_record(null::public.admission_item, p - 'user_id' - 'key_id');
    v_user public.users;
    v_key public.api_keys_new;
    v_plan public.plans;
    v_usage public.rate_limit_usage;
    v_available bigint;
    v_budget bigint;
    v_end_user jsonb;
    v_end_user_left bigint;
    v_least bigint;
    v_granted bigint;
    v_byok boolean;
begin
    select * into v_user from public.users where id = (p ->> 'user_id')::bigint;
    select * into v_key from public.api_keys_new where id = (p ->> 'key_id')::bigint and user_id = v_user.id;
    if not found then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    v_plan := public.current_plan(v_user, v_now);
    select * into v_usage from public.rate_limit_usage where subject = 'key' and subject_id = v_key.id;
    v_usage := public.advance_usage(v_usage, v_now, v_key.budget_window);
    v_byok := exists (select from public.provider_keys k where k.user_id = v_user.id and k.is_active);
    if not public.models_allowed(v_key.allowed_models, v_item.models)
       or not public.models_allowed(v_plan.allowed_models, v_item.models) then
        return jsonb_build_object('outcome', 'MODEL_NOT_ALLOWED');
    elsif v_usage.requests_used >= v_key.max_requests then
        return jsonb_build_object('outcome', 'REQUEST_LIMIT_EXCEEDED');
    elsif v_key.environment_tag = 'test' then
        return jsonb_build_object(
            'outcome', 'granted', 'granted_output', v_item.max_output, 'hold_nanos', 0, 'byok', false,
            'free', true);
    elsif v_user.subscription_status = 'trial' and v_user.trial_expires_at <= v_now then
        return jsonb_build_object('outcome', 'trial_expired');
    elsif v_byok then
        return jsonb_build_object(
            'outcome', 'granted', 'granted_output', v_item.max_output, 'hold_nanos', 0, 'byok', true,
            'free', false);
    end if;
    v_available := v_user.credits_nanos - v_user.held_nanos;
    v_budget := v_key.budget_nanos - coalesce(v_usage.budget_spent_nanos + v_usage.budget_held_nanos, 0);
    v_end_user := public.end_user_standing(v_user.id, p ->> 'end_user', v_now);
    v_end_user_left := (v_end_user ->> 'budget_nanos')::bigint - (v_end_user ->> 'spent_nanos')::bigint
                       - (v_end_user ->> 'held_nanos')::bigint;
    v_least := greatest(0, least(v_available, v_budget, v_end_user_left));
    v_granted := public.affordable_output(v_item, v_least);
    return jsonb_build_object(
        'outcome', case when v_granted >= v_item.min_output then 'granted'
                        when v_end_user_left < least(v_available, v_budget) then 'end_user_budget'
                        when v_budget < v_available then 'budget' else 'credits' end,
        'granted_output', greatest(0, v_granted), 'available_nanos', v_least, 'byok', false, 'free', false,
        'hold_nanos', ceil((v_item.fixed_nanos + v_item.output_nanos * greatest(v_granted, v_item.min_output))
                           * v_item.markup));
end $$;
revoke all on function public.quote_request(jsonb) from public, anon, authenticated;
grant execute on function public.quote_request(jsonb) to service_role;
