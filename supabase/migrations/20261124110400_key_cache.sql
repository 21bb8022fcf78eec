-- Keys that use the response cache by default say so when they are made or changed, and a replay tells the tokens that its charge was for.

-- p: user_id, maker_id, key {...}. Outcomes: created, too_many (with the limit that was met), name_taken, broader, not_found.
create or replace function public.create_key(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
    v_maker public.api_keys_new := public.acting_key(p);
    v_key public.api_keys_new;
    v_why text;
begin
    if v_user.id is null or v_maker.id is null then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    v_key := jsonb_populate_record(v_key, p -> 'key');
    v_why := public.broader_than(v_key, v_maker);
    if v_why is null and exists (select from public.rate_limit_configs c where c.subject = 'key' and c.subject_id = v_maker.id) then
        v_why := 'rate_limits';
    end if;
    if v_why is not null then
        return jsonb_build_object('outcome', 'broader', 'field', v_why);
    elsif (select count(*) from public.api_keys_new k where k.user_id = v_user.id and k.revoked_at is null and k.is_active) >= 50 then
        return jsonb_build_object('outcome', 'too_many', 'limit', 50);
    elsif (select count(*) from public.api_keys_new k where k.user_id = v_user.id and k.revoked_at is null) >= 500 then
        return jsonb_build_object('outcome', 'too_many', 'limit', 500);
    elsif exists (select from public.api_keys_new k where k.user_id = v_user.id and k.revoked_at is null and k.key_name = v_key.key_name) then
        return jsonb_build_object('outcome', 'name_taken');
    end if;
    insert into public.api_keys_new (user_id, key_name, key_prefix, last4, key_hash, hash_secret_id, encrypted_key, environment_tag,
                                     scope_permissions, ip_allowlist, domain_referrers, allowed_models, expiration_date, max_requests,
                                     budget_nanos, budget_window, cache_ttl_seconds)
    values (v_user.id, v_key.key_name, v_key.key_prefix, v_key.last4, v_key.key_hash, v_key.hash_secret_id, v_key.encrypted_key,
            v_key.environment_tag, v_key.scope_permissions, v_key.ip_allowlist, v_key.domain_referrers, v_key.allowed_models,
            v_key.expiration_date, v_key.max_requests, v_key.budget_nanos, v_key.budget_window, v_key.cache_ttl_seconds)
    returning * into v_key;
    insert into public.rate_limit_usage (subject, subject_id, burst_ring, minute_ring, hour_ring, day_ring)
    values ('key', v_key.id, null, null, null, null);
    perform public.audit_key(p, 'create', v_key, jsonb_build_object('key_name', v_key.key_name, 'environment_tag', v_key.environment_tag));
    return jsonb_build_object('outcome', 'created', 'key', public.key_view(v_key));
end $$;

-- p: user_id, maker_id, key_id, changes {...}. Outcomes: updated, name_taken, broader, too_many, not_found.
create or replace function public.update_key(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
    v_maker public.api_keys_new := public.acting_key(p);
    v_key public.api_keys_new;
    v_why text;
begin
    select * into v_key from public.api_keys_new k
    where k.id = (p ->> 'key_id')::bigint and k.user_id = v_user.id and k.revoked_at is null for update;
    if not found or v_maker.id is null then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    v_key := jsonb_populate_record(v_key, p -> 'changes');
    v_why := public.broader_than(v_key, v_maker);
    if v_why is not null then
        return jsonb_build_object('outcome', 'broader', 'field', v_why);
    elsif exists (select from public.api_keys_new k where k.user_id = v_user.id and k.revoked_at is null
                  and k.key_name = v_key.key_name and k.id <> v_key.id) then
        return jsonb_build_object('outcome', 'name_taken');
    elsif v_key.is_active and (select count(*) from public.api_keys_new k where k.user_id = v_user.id and k.revoked_at is null
                               and k.is_active and k.id <> v_key.id) >= 50 then
        return jsonb_build_object('outcome', 'too_many');
    end if;
    update public.api_keys_new k set
        key_name = v_key.key_name, scope_permissions = v_key.scope_permissions, ip_allowlist = v_key.ip_allowlist,
        domain_referrers = v_key.domain_referrers, allowed_models = v_key.allowed_models, expiration_date = v_key.expiration_date,
        max_requests = v_key.max_requests, budget_nanos = v_key.budget_nanos, budget_window = v_key.budget_window,
        cache_ttl_seconds = v_key.cache_ttl_seconds, is_active = v_key.is_active, updated_at = clock_timestamp()
    where k.id = v_key.id returning * into v_key;
    perform public.audit_key(p, 'update', v_key, jsonb_build_object('fields', (select jsonb_agg(f) from jsonb_object_keys(p -> 'changes') f)));
    return jsonb_build_object('outcome', 'updated', 'key', public.key_view(v_key));
end $$;

-- What this idempotency key has been used for, null where it is free. A replay is no admitted request: it is neither recorded nor
-- charged, and no limit stands in its way, as its answer has been paid for.
-- Outcomes: replayed, idempotency_running (with `expired`, where its instance seems to be gone), idempotency_conflict (another body),
-- idempotency_not_kept (charged, but its answer was not kept).
create or replace function public.check_idempotency(p_item public.admission_item, p_key public.api_keys_new, p_now timestamptz) returns jsonb
language plpgsql as $$
declare
    v_row public.stored_answers;
    v_record public.usage_records;
    v_base jsonb;
begin
    select * into v_row from public.stored_answers
    where user_id = p_key.user_id and kind = 'idempotency' and place = p_item.idempotency ->> 'place';
    if not found or (v_row.state = 'finished' and v_row.expires_at <= p_now) then
        return null;
    end if;
    select * into v_record from public.usage_records where request_id = v_row.request_id;
    if v_row.state = 'running' and v_record.status is distinct from 'pending' then
        return null;
    end if;
    v_base := jsonb_build_object('user_id', p_key.user_id, 'key_id', p_key.id, 'environment', v_record.environment,
                                 'original_request_id', v_row.request_id, 'status', v_record.status, 'cost_nanos', v_record.cost_nanos,
                                 'balance_after_nanos', v_record.balance_after_nanos);
    if v_row.fingerprint <> p_item.idempotency ->> 'fingerprint' then
        return v_base || jsonb_build_object('outcome', 'idempotency_conflict');
    elsif v_row.state = 'running' then
        return v_base || jsonb_build_object(
            'outcome', 'idempotency_running',
            'retry_after', least(30, greatest(1, ceil(extract(epoch from p_now - v_record.created_at) / 2)))::int,
            'expired', case when v_record.expires_at <= p_now then jsonb_build_array(public.hold_json(v_record)) end);
    elsif v_row.answer = '' then
        return v_base || jsonb_build_object('outcome', 'idempotency_not_kept');
    end if;
    return v_base || jsonb_build_object('outcome', 'replayed', 'answer', v_row.answer,
                                        'age', floor(extract(epoch from p_now - v_row.created_at))::bigint,
                                        'tokens', coalesce(v_record.prompt_tokens, 0) + coalesce(v_record.completion_tokens, 0));
end $$;

create or replace function public.schema_version() returns bigint language sql immutable set search_path = '' as $$
    select 20261124110400::bigint
$$;

notify pgrst, 'reload schema';
